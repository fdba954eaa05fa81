#!/usr/bin/env bash
# kohya's sd-scripts, in their folder: flags to add to your own command.
# The rate below was tuned at rank 16, alpha 16. The network module moves it to rank 64, alpha 64.
accelerate launch train_network.py "$@" \
    --network_module rankaware_optim.integrations.kohya \
    --network_args "rankaware_tuned_at=r=16,alpha=16" "rankaware_network=networks.lora" \
    --network_dim 64 --network_alpha 64 \
    --learning_rate 1e-4 --text_encoder_lr 1e-5
