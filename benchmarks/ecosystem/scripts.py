"""Do public training scripts keep the law with the one line of ours? Plain and patched runs of each, side by side.

    python benchmarks/ecosystem/scripts.py --sources FOLDER     # results/scripts.json and .md, about half an hour
    python benchmarks/ecosystem/scripts.py --sources FOLDER --only nanoGPT

FOLDER holds clones of the scripts' repositories: nanoGPT, minLoRA, peft, diffusers, litgpt. TRL's scripts are those of
the installed package. No code of theirs is kept here: a patch is a pair of a text that occurs once in the script and
the text to put there, and a script that has changed is refused. The runs are a few steps of a tiny model with random
weights, on a CPU and offline. minLoRA is put into both the plain and the patched nanoGPT.

* tuned rank: whether the patched run saves the weights of the plain one, bit for bit, at the rank of `tuned_at`.
* worst rate: largest |rate / (plain rate × multiplier) − 1| at another rank, over all steps and tensors. Both rates are
  read where Adam computes. The multiplier is that of `ra.convert_lr` at the model's widths, which builds no optimizer.
  Tensors and weight decay of each step must be the plain run's, too.
* resumed: from the patched run's own checkpoint in the middle, then from the plain run's: steps and rates go on.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from recording import RESULTS, machine, record

sys.path.insert(0, str(Path(__file__).parents[2]))

import rankaware_optim as ra

RESTS_ON = ("laws.adam", "optimizer.common")
TITLE = "Public scripts, plain and with one line of ours"
BAR, STEPS, HALF, BATCH = 2e-4, 8, 4, 2
RATE, ALPHA, TUNED, OTHER = 1e-3, 16, 8, 32
RECORDED = Path(__file__).with_name("recorded.py")
IMPORT = "import rankaware_optim as ra\n"
NOTES = (
    f"{STEPS} steps on a CPU, with a schedule and its warm-up. tuned rank: the saved weights are the plain script's, bit"
    f" for bit. worst rate: at another rank, relative to plain rate × multiplier; the bar is {BAR:g}. resumed: from its"
    f" own checkpoint at step {HALF}, compared with the run that was not stopped; then from the plain script's"
    " checkpoint. lines: those that a diff adds, the import included.",
    "A rate of 0.0e+00 off is the same number. nanoGPT draws other batches when it resumes, with and without the patch."
    " With --train_text_encoder, transformers asks for a PEFT that is not released.",
)


class Change(NamedTuple):
    """A text that occurs once in a script, and what to put there."""

    find: str
    put: str


class Script(NamedTuple):
    """A public script.

    Args:
        path: the script in its repository, or in the installed package.
        ours: the changes of the patched run. TUNED_AT is replaced.
        needs: modules without which it is not run.
        arguments: its command line, where {world} is the folder of models and data, {rank} the rank and {out} the
            folder to write to. "" where it was never run.
        resume: what a resumed run adds to it. "" where the script does not offer it.
        weights: the file with the last weights.
        checkpoint: the file or folder of step HALF.
        adapters: changes of both runs, where the script has no LoRA.
        expand: changes that fit a plain run's scheduler to the groups here, where the script cannot go on without.
        half: what a run adds that leaves the checkpoint of step HALF as its last, where a script keeps one.
        alpha: the alpha at a rank.
        width: the mean fan-in of adapted layers, weighted by their size.
        full: the largest fan-in, where all weights train.
    """

    name: str
    package: str
    path: str
    ours: tuple[Change, ...]
    needs: tuple[str, ...] = ()
    arguments: str = ""
    resume: str = ""
    weights: str = ""
    checkpoint: str = f"checkpoint-{HALF}"
    adapters: tuple[Change, ...] = ()
    expand: tuple[Change, ...] = ()
    half: str = ""
    alpha: Callable[[int], int] = lambda rank: ALPHA
    width: float = 0.0
    full: float = 0.0


# --- patching -------------------------------------------------------------------------------------------------------


def patched(text: str, changes: Sequence[Change]) -> str:
    """The script with these changes. A text to find that does not occur once is refused."""
    for change in changes:
        times = text.count(change.find)
        if times != 1:
            raise click.ClickException(
                f"The script has {times} times, not once: {change.find!r}"
            )
        text = text.replace(change.find, change.put)
    return text


def lines_added(before: str, after: str) -> int:
    """How many lines a diff adds."""
    rows = difflib.ndiff(before.splitlines(), after.splitlines())
    return sum(row.startswith("+ ") for row in rows)


def before(line: str, put: str) -> Change:
    """Put lines before a line of the script."""
    return Change(line, put + line)


def after(line: str, put: str) -> Change:
    """Put lines after a line of the script."""
    return Change(line, line + put)


# --- the scripts ----------------------------------------------------------------------------------------------------

NANOGPT = f"""
    --out_dir={{out}} --dataset=tiny --device=cpu --dtype=float32 --compile=False --n_layer=2 --n_head=2 --n_embd=32
    --block_size=16 --batch_size={BATCH} --gradient_accumulation_steps=1 --max_iters={STEPS} --eval_interval={HALF}
    --eval_iters=1 --warmup_iters=2 --lr_decay_iters={STEPS} --learning_rate={RATE} --min_lr={RATE / 10}"""
TRAINER = f"""
    --model_name_or_path {{world}}/llama --output_dir {{out}} --max_steps {STEPS} --save_steps {HALF}
    --per_device_train_batch_size {BATCH} --learning_rate {RATE} --lr_scheduler_type cosine --warmup_steps 2
    --logging_steps 1 --report_to none --bf16 False --use_cpu True --lora_r {{rank}} --lora_alpha {ALPHA}"""
TRL = f"{TRAINER} --use_peft --lora_target_modules q_proj v_proj"
PEFT = f"{TRAINER} --use_peft_lora True --lora_target_modules q_proj,v_proj"
DIFFUSERS = f"""
    --pretrained_model_name_or_path {{world}}/diffusion --output_dir {{out}} --rank {{rank}} --resolution 16
    --train_batch_size {BATCH} --max_train_steps {STEPS} --checkpointing_steps {HALF} --learning_rate {RATE}
    --lr_scheduler cosine --lr_warmup_steps 2 --seed 0"""
PICTURES = f"{DIFFUSERS} --train_data_dir {{world}}/pictures --caption_column text"
DREAMBOOTH = (
    f"{DIFFUSERS} --instance_data_dir {{world}}/instances --instance_prompt cat"
)

BLOCK = ((32, 96), (32, 32), (32, 128), (128, 32))  # nanoGPT's fan-ins and fan-outs
HEAD = (32, 64)  # in full it is the embedding, too, which no width includes


def mean_fan_in(*layers: tuple[int, int]) -> float:
    """The mean fan-in, weighted by the size of the layers."""
    return sum(n * n * m for n, m in layers) / sum(n * m for n, m in layers)


def nanogpt(more: str) -> tuple[Change, Change]:
    """The import, and a line after the one that builds the optimizer."""
    line = (
        "optimizer = model.configure_optimizers(weight_decay, learning_rate,"
        " (beta1, beta2), device_type)\n"
    )
    ours = f'optimizer = ra.RankAwareOptimizer(optimizer, model=model, tuned_at="TUNED_AT", {more})\n'
    return before("import numpy as np\n", IMPORT), after(line, ours)


def attached(first: str, line: str) -> tuple[Change, Change]:
    """The import before a line, and `attach` before another one."""
    ours = '    ra.integrations.attach(trainer, tuned_at="TUNED_AT")\n'
    return before(first, IMPORT), before(line, ours)


def built(first: str, line: str, params: str, model: str) -> tuple[Change, Change]:
    """The import before a line, and another class where the optimizer is built."""
    head, _, cls = line.rpartition(" ")
    ours = (
        f"{head} ra.RankAwareOptimizer(\n"
        f'        {params}, {cls[:-1]}, model={model}, tuned_at="TUNED_AT",\n'
    )
    return before(first, IMPORT), Change(f"{line}\n        {params},\n", ours)


ADD_LORA = (
    "    add_lora(model, {torch.nn.Linear: {'weight': partial(LoRAParametrization.from_linear,"
    f" rank=int(os.environ['LORA_RANK']), lora_alpha={ALPHA})}}}})\n"
)
MINLORA = (
    before(
        "import numpy as np\n",
        "from functools import partial\n"
        "from minlora import LoRAParametrization, add_lora, name_is_lora\n",
    ),
    Change(
        "    model = GPT(gptconf)\nelif",
        f"    model = GPT(gptconf)\n{ADD_LORA}elif",
    ),
    Change(
        "    model = GPT(gptconf)\n    state_dict",
        f"    model = GPT(gptconf)\n{ADD_LORA}    state_dict",
    ),
    after(
        "model.to(device)\n",
        "for name, param in model.named_parameters():\n"
        "    param.requires_grad = name_is_lora(name)\n",
    ),
)
ON_TRAINER = {
    "needs": ("trl",),
    "resume": f"--resume_from_checkpoint {{out}}/checkpoint-{HALF}",
    "weights": "adapter_model.safetensors",
    "width": 128.0,
}
ON_NANOGPT = {
    "package": "nanoGPT",
    "path": "train.py",
    "arguments": NANOGPT,
    "resume": "--init_from=resume",
    "weights": "ckpt.pt",
    "checkpoint": "ckpt.pt",
    "half": f"--max_iters={HALF}",
}
EXPAND = after(
    "            accelerator.load_state(os.path.join(args.output_dir, path))\n",
    "            plain = lr_scheduler.scheduler\n"
    "            plain.base_lrs = optimizer.optimizer.expand(plain.base_lrs)\n"
    "            plain._last_lr = optimizer.optimizer.expand(plain._last_lr)\n",
)
ON_DIFFUSERS = {
    "package": "diffusers",
    "needs": ("diffusers", "torchvision"),
    "resume": "--resume_from_checkpoint latest",
    "weights": "pytorch_lora_weights.safetensors",
    "expand": (EXPAND,),
    "alpha": lambda rank: rank,
    "width": 32.0,
}
OPTIMIZER = "    optimizer = optimizer_class("
SCRIPTS = (
    Script(
        "nanoGPT train.py, full finetuning",
        ours=nanogpt('method="full"'),
        width=mean_fan_in(*BLOCK),
        full=128.0,
        **ON_NANOGPT,
    ),
    Script(
        "nanoGPT train.py with minLoRA",
        ours=nanogpt('init="A"'),
        needs=("minlora",),
        adapters=MINLORA,
        width=mean_fan_in(*BLOCK, *BLOCK, HEAD),
        **ON_NANOGPT,
    ),
    Script(
        "TRL sft.py",
        "trl",
        "scripts/sft.py",
        attached("import argparse\n", "    # Train the model\n"),
        arguments=f"{TRL} --dataset_name {{world}}/text",
        **ON_TRAINER,
    ),
    Script(
        "TRL dpo.py",
        "trl",
        "scripts/dpo.py",
        attached("import argparse\n", "    # Train the model\n"),
        arguments=f"{TRL} --dataset_name {{world}}/preferences",
        **ON_TRAINER,
    ),
    Script(
        "PEFT examples/sft/train.py",
        "peft",
        "examples/sft/train.py",
        attached("import sys\n", "    # train\n"),
        arguments=f"{PEFT} --dataset_name {{world}}/text",
        **ON_TRAINER,
    ),
    Script(
        "diffusers train_text_to_image_lora.py",
        path="examples/text_to_image/train_text_to_image_lora.py",
        ours=built(
            "import datasets\n",
            "    optimizer = optimizer_cls(",
            "lora_layers",
            "unet",
        ),
        arguments=PICTURES,
        **ON_DIFFUSERS,
    ),
    Script(
        "diffusers train_dreambooth_lora.py",
        path="examples/dreambooth/train_dreambooth_lora.py",
        ours=built("import numpy as np\n", OPTIMIZER, "params_to_optimize", "unet"),
        arguments=DREAMBOOTH,
        **ON_DIFFUSERS,
    ),
    Script(
        "diffusers train_dreambooth_lora.py --train_text_encoder",
        path="examples/dreambooth/train_dreambooth_lora.py",
        ours=built(
            "import numpy as np\n",
            OPTIMIZER,
            "params_to_optimize",
            "[unet, text_encoder]",
        ),
        arguments=f"{DREAMBOOTH} --train_text_encoder",
        **ON_DIFFUSERS,
    ),
    Script(
        "litgpt finetune/lora.py",
        "litgpt",
        "litgpt/finetune/lora.py",
        (
            before("import lightning as L\n", IMPORT),
            after(
                "        optimizer = instantiate_torch_optimizer(optimizer, model.parameters())\n",
                '        optimizer = ra.RankAwareOptimizer(optimizer, model=model, tuned_at="TUNED_AT")\n',
            ),
        ),
        needs=("lightning", "jsonargparse"),
    ),
)


# --- models and data ------------------------------------------------------------------------------------------------


def make_world(world: Path) -> None:
    """Write the tiny models and data that the scripts read."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import tiny

    tiny.write(world / "llama")
    texts = [{"text": text} for text in tiny.TEXTS]
    pairs = [
        {"prompt": "the small cat", "chosen": f" {text}", "rejected": " the tree"}
        for text in tiny.TEXTS
    ]
    write_rows(world / "text" / "train.jsonl", texts)
    write_rows(world / "text" / "test.jsonl", texts[:4])
    write_rows(world / "preferences" / "train.jsonl", pairs)
    make_diffusion(world / "diffusion", tiny.WORDS[2:])
    make_pictures(world)


def write_rows(file: Path, rows: Sequence[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_pictures(world: Path) -> None:
    """Eight random pictures with captions, and four without."""
    from PIL import Image

    for folder, number in (("pictures", 8), ("instances", 4)):
        (world / folder).mkdir()
        for i in range(number):
            pixels = torch.randint(
                0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i)
            )
            picture = Image.fromarray(pixels.to(torch.uint8).numpy())
            picture.save(world / folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": "a small cat"} for i in range(8)]
    write_rows(world / "pictures" / "metadata.jsonl", rows)


def make_diffusion(folder: Path, words: Sequence[str]) -> None:
    """A Stable Diffusion of a few thousand weights."""
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(*clip_files(folder, words), model_max_length=16)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(num_train_timesteps=100),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def clip_files(folder: Path, words: Sequence[str]) -> tuple[str, str]:
    """A vocabulary of letters, and no merges, as CLIP's tokenizer reads them."""
    folder.mkdir(parents=True)
    letters = sorted({letter for word in words for letter in word})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    return str(vocabulary), str(merges)


def make_tokens(folder: Path) -> None:
    """nanoGPT's files of tokens."""
    folder.mkdir(parents=True)
    tokens = torch.randint(0, 64, (512,), generator=torch.Generator().manual_seed(0))
    for split in ("train", "val"):
        tokens.to(torch.uint16).numpy().tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 64}))


# --- running --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A script's folder, copied to where it runs, with what it reads."""

    script: Script
    folder: Path
    world: Path
    into: Path
    path: str


class Done(NamedTuple):
    """A run: the folder that it wrote, its calls of Adam's arithmetic, and its last line of error, "" if it ended."""

    out: Path
    calls: list[dict[str, Any]]
    error: str


def run(
    place: Place,
    name: str,
    rank: int,
    text: str,
    start: Done | None = None,
    more: str = "",
) -> Done:
    """Run a text of the script at a rank, from the checkpoint of another run if one is given."""
    out = place.into / name
    out.mkdir(parents=True)
    script, rates = place.script, place.into / f"{name}.json"
    file = place.folder / Path(script.path).name
    file.write_text(text)
    options = f"{script.arguments} {more}"
    if start is not None:
        copy(start.out / script.checkpoint, out / script.checkpoint)
        options += f" {script.resume}"
    filled = options.format(world=place.world, rank=rank, out=out).split()
    done = subprocess.run(
        [sys.executable, str(RECORDED), str(rates), str(file), *filled],
        cwd=place.folder,
        env={**os.environ, **OFFLINE, "PYTHONPATH": place.path, "LORA_RANK": str(rank)},
        capture_output=True,
        text=True,
        check=False,
    )
    says = done.stdout + done.stderr
    (place.into / f"{name}.log").write_text(says)
    calls = json.loads(rates.read_text()) if rates.exists() else []
    errors = re.findall(r"^\w[\w.]*Error: .*", done.stderr, re.MULTILINE)
    error = "" if done.returncode == 0 else (errors or ["it stopped"])[-1]
    if error and "RankAwareWarning" in says:
        error += " (a warning came before)"
    return Done(out, calls, error)


OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    """The weights that a script saved."""
    if file.suffix == ".pt":
        found: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["model"]
        return found
    from safetensors.torch import load_file

    return load_file(file)


def same(one: Done, other: Done, script: Script) -> bool:
    """Whether two runs saved the same weights, bit for bit."""
    a, b = (weights_of(done.out / script.weights) for done in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- comparing ------------------------------------------------------------------------------------------------------


def by_step(calls: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    steps: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for call in calls:
        steps[call["step"]].append(call)
    return steps


def worst(plain: Done, ours: Done, multiplier: float, since: int = 0) -> float:
    """The largest relative error of a rate. Infinite where steps, tensors or weight decays are not the plain run's."""
    base, found = by_step(plain.calls), by_step(ours.calls)
    if found.keys() != {step for step in base if step >= since}:
        return math.inf
    errors = [0.0]
    for step, calls in found.items():
        if decays(calls) != decays(base[step]):
            return math.inf
        (rate,) = {call["lr"] for call in base[step]}
        errors += [off(call["lr"], rate * multiplier) for call in calls]
    return max(errors)


def off(rate: float, wanted: float) -> float:
    if wanted:
        return abs(rate / wanted - 1.0)
    return math.inf if rate else 0.0


def decays(calls: Sequence[dict[str, Any]]) -> dict[float, int]:
    """How many tensors of a step have each weight decay."""
    tensors: dict[float, int] = defaultdict(int)
    for call in calls:
        tensors[call["weight_decay"]] += call["tensors"]
    return tensors


def expected(script: Script) -> float:
    """The law's multiplier for the run at another rank, or in full."""
    at = f"{configured(script, TUNED)},fan_in={script.width}"
    here = f"{configured(script, OTHER)},fan_in={script.width}"
    if script.full:
        here = f"full,fan_in={script.full}"
    return ra.convert_lr(1.0, from_=at, to=here).lr


def configured(script: Script, rank: int) -> str:
    return f"r={rank},alpha={script.alpha(rank)}"


# --- the table ------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--sources", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--only", help="A part of a script's name.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="A folder for runs and logs."
)
def main(sources: Path, only: str | None, keep: Path | None) -> None:
    """Run the scripts, and write results/scripts.json and .md. With --only the other rows stay."""
    with tempfile.TemporaryDirectory() as temporary:
        into = (keep or Path(temporary)).resolve()
        world = into / "world"
        if not world.exists():
            make_world(world)
        chosen = [script for script in SCRIPTS if (only or "") in script.name]
        made = {}
        for script in chosen:
            made[script.name] = row(script, sources.resolve(), world, into)
            print(made[script.name], flush=True)
    file = RESULTS / "scripts.json"
    known = json.loads(file.read_text())["rows"] if only and file.exists() else []
    rows = {row["script"]: row for row in known} | made
    ordered = [rows[script.name] for script in SCRIPTS if script.name in rows]
    record("scripts", TITLE, ordered, machine(1) | versions(), NOTES)


def versions() -> dict[str, str]:
    names = ("transformers", "trl", "peft", "diffusers", "accelerate")
    return {name: version(name) for name in names}


def row(script: Script, sources: Path, world: Path, into: Path) -> dict[str, Any]:
    """A script's row, from its plain and patched runs."""
    cells: dict[str, Any] = {
        "script": script.name,
        "version": version_of(script, sources),
        "lines": None,
        "tuned rank": None,
        "multiplier": None,
        "worst rate": None,
    }
    text = (home_of(script, sources) / script.path).read_text()
    plain = patched(text, script.adapters)
    at = configured(script, TUNED)
    moved = patched(plain, tuned_at(at, script.ours))
    tuned = patched(plain, tuned_at("full" if script.full else at, script.ours))
    cells["lines"] = lines_added(plain, moved)
    sys.path.append(str(sources / "minLoRA"))
    missing = [name for name in script.needs if find_spec(name) is None]
    if missing or not script.arguments:
        return cells | {"resumed": f"not run here: without {' and '.join(missing)}"}
    place = laid_out(script, sources, world, into)
    first = run(place, "plain", TUNED, plain)
    if first.error:
        return cells | {"resumed": f"not run: the plain script ends, {first.error}"}
    same_rank = run(place, "patched", TUNED, tuned)
    base = first if script.full else run(place, "plain-other", OTHER, plain)
    ours = run(place, "patched-other", OTHER, moved)
    if same_rank.error or ours.error:
        return cells | {"resumed": same_rank.error or ours.error}
    multiplier = expected(script)
    return cells | {
        "tuned rank": "bit-equal" if same(first, same_rank, script) else "DIFFERS",
        "multiplier": multiplier,
        "worst rate": f"{worst(base, ours, multiplier):.1e}",
        "resumed": resumed(place, (plain, base), (moved, ours), multiplier),
    }


def tuned_at(words: str, changes: Sequence[Change]) -> list[Change]:
    return [
        change._replace(put=change.put.replace("TUNED_AT", words)) for change in changes
    ]


def resumed(
    place: Place, plain: tuple[str, Done], changed: tuple[str, Done], multiplier: float
) -> str:
    """How the patched script goes on from its own checkpoint, and from the plain script's."""
    script = place.script
    if not script.resume:
        return "not offered"
    (text, base), (moved, ours) = plain, changed
    halves = [
        run(place, f"half-{name}", OTHER, words, None, script.half)
        if script.half
        else whole
        for name, words, whole in (("plain", text, base), ("patched", moved, ours))
    ]
    control = run(place, "plain-on", OTHER, text, halves[0])
    own = run(place, "patched-on", OTHER, moved, halves[1])
    crossed = run(place, "crossed-on", OTHER, moved, halves[0])
    words = went_on(base, own, multiplier)
    if words == "yes":
        if same(own, ours, script):
            words = "yes, bit-equal"
        elif not control.error and not same(control, base, script):
            words = "yes; weights differ from the run that was not stopped, as the plain script's do"
        else:
            words = "rates as they should be, WEIGHTS DIFFER"
    words += f"; from a plain checkpoint: {went_on(base, crossed, multiplier)}"
    if script.expand:
        expanded = run(
            place, "expanded-on", OTHER, patched(moved, script.expand), halves[0]
        )
        words += f", with its scheduler expanded: {went_on(base, expanded, multiplier)}"
    return words


def went_on(base: Done, own: Done, multiplier: float) -> str:
    if own.error:
        return f"NO, {own.error}".replace("|", "/")
    error = worst(base, own, multiplier, since=HALF)
    return "yes" if error <= BAR else f"NO, a rate is off by {error:.1e}"


def laid_out(script: Script, sources: Path, world: Path, into: Path) -> Place:
    """Copy the script's folder to where it runs."""
    folder = into / re.sub(r"\W+", "-", script.name)
    code = (home_of(script, sources) / script.path).parent
    shutil.copytree(code, folder / "code", ignore=shutil.ignore_patterns(".git"))
    if script.package == "nanoGPT":
        make_tokens(folder / "code" / "data" / "tiny")
    path = [str(Path(ra.__file__).parents[1]), str(sources / "minLoRA")]
    return Place(script, folder / "code", world, folder, os.pathsep.join(path))


def home_of(script: Script, sources: Path) -> Path:
    """The clone, or the installed package where there is no clone: TRL has its scripts in it."""
    clone = sources / script.package
    spec = find_spec(script.package)
    if clone.is_dir() or spec is None or spec.origin is None:
        return clone
    return Path(spec.origin).parent


def version_of(script: Script, sources: Path) -> str:
    """The commit of the clone, or the version of the package."""
    clone = sources / script.package
    if not clone.is_dir():
        return version(script.package)
    git = ["git", "-C", str(clone), "rev-parse", "--short=8", "HEAD"]
    return subprocess.run(
        git, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
