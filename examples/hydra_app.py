"""
Hydra
=====

Run this example with ``python examples/hydra_app.py optimizer.lr=1e-4``. Because of ``_partial_: true`` in the YAML
file, Hydra returns a function. The script calls this function with the model to build the optimizer.
"""

import hydra
import peft
import tiny
from omegaconf import DictConfig

import rankaware_optim as ra


@hydra.main(version_base=None, config_path=".", config_name="hydra_app")
def main(config: DictConfig) -> None:
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.rank, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(tiny.model(), lora)
    opt: ra.RankAwareOptimizer = hydra.utils.instantiate(config.optimizer)(model)
    for batch in tiny.tokenizer()(tiny.TEXTS, return_tensors="pt")["input_ids"].split(
        8
    ):
        model(input_ids=batch, labels=batch).loss.backward()
        opt.step()
        opt.zero_grad()
    print(opt.report())


if __name__ == "__main__":
    main()
