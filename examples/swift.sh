#!/usr/bin/env bash
# ms-swift, after: python examples/tiny.py tiny
# The rate below was tuned at rank 16, alpha 32. The plug-in moves it to rank 64, alpha 64.
set -euo pipefail
plugin=$(python -c 'from rankaware_optim.integrations.external_plugins import SWIFT; print(SWIFT)')
RANKAWARE_TUNED_AT="r=16,alpha=32" swift sft \
    --model tiny --model_type llama --template dummy \
    --dataset tiny/rows.jsonl \
    --tuner_type lora --lora_rank 64 --lora_alpha 64 --target_modules q_proj v_proj \
    --external_plugins "$plugin" --optimizer rankaware --learning_rate 2e-4 \
    --torch_dtype float32 --max_length 32 --max_steps 4 --logging_steps 1 --report_to none \
    --per_device_train_batch_size 2 --dataset_num_proc 1 --output_dir swift-out
