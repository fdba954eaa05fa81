"""Every optimizer class of the installed packages, and what each requires of the groups and the
training loop.
"""

from __future__ import annotations

import importlib
import inspect
import warnings

from torch.optim import Optimizer

from .by_hand import Case

P = "pytorch_optimizer."
PACKAGES = (
    "torch.optim",
    "torch_optimizer",
    "pytorch_optimizer",
    "schedulefree",
    "bitsandbytes.optim",
    "torchao.optim",
    "prodigyopt",
    "adv_optm",
    "optimi",
    "galore_torch",
    "apollo_torch",
    "timm.optim",
    "came_pytorch",
    "lion_pytorch",
    "transformers.optimization",
    "omnimuon",
    "torchium.optimizers",
    "muonium.optim",
    "nadir",
    "heavyball",
    "optimuon",
    "muon",
    "kron_torch",
    "madgrad",
    "sophia_opt",
)

MUONS = ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")

# What a class needs besides a learning rate: settings, groups, a closure, or a wide model.
NEEDS = {
    "torch.optim.Muon": {"groups": "matrices"},
    "torch.optim.SparseAdam": {"sparse": True},
    "torch_optimizer.Adahessian": {"graph": True},
    P + "AdaHessian": {"graph": True},
    P + "SophiaH": {"graph": True},
    P + "AdaShift": {"settings": {"keep_num": 2}},
    P + "BSAM": {"settings": {"num_data": 8}, "closure": True},
    P + "Ranger21": {"settings": {"num_iterations": 8, "disable_lr_scheduler": True}},
    P + "ApolloDQN": {"settings": {"warmup_steps": 0}},
    P + "SpectralSphere": {"groups": "matrices"},
    **{P + name: {"groups": "muon"} for name in MUONS},
    **{
        f"schedulefree.{name}ScheduleFreeClosure": {"closure": True}
        for name in ("AdamW", "RAdam", "SGD")
    },
    # state is kept in 8 bits only for tensors of at least 4,096 entries
    "bitsandbytes.optim.AdamW8bit": {"width": 1024},
    "torchao.optim.AdamW8bit": {"width": 1024},
    **{f"adv_optm.{name}": {"groups": "muon"} for name in ("AdaMuon_adv", "Muon_adv")},
    **{
        f"bitsandbytes.optim.{name}{bits}": {"settings": {"momentum": 0.9}}
        for name in ("LARS", "SGD")
        for bits in ("", "8bit", "32bit")
    },
    # torch's CUDA build includes Triton, and with it this class needs a GPU
    "optimi.StableAdamW": {"settings": {"triton": False}},
    "timm.optim.Adahessian": {"graph": True},
    **{
        name: {"settings": {"relative_step": False}}
        for name in (
            "torch_optimizer.Adafactor",
            P + "AdaFactor",
            "galore_torch.GaLoreAdafactor",
            "apollo_torch.GaLoreAdafactor",
            "transformers.optimization.Adafactor",
            "torchium.optimizers.AdaFactor",
        )
    },
    "heavyball.AdamC": {"settings": {"max_lr": 1e-3}},
    "muonium.optim.Muon": {"groups": "matrices"},
    "muonium.optim.MuonLP": {"groups": "matrices"},
    "optimuon.Muon": {"groups": "matrices"},
    "muon.SingleDeviceMuon": {"groups": "matrices"},
    "torchium.optimizers.AdaHessian": {"graph": True},
    "torchium.optimizers.SparseAdam": {"sparse": True},
}

# Classes that raise an error before anything is built, with a part of the message.
HOLDS = "another optimizer"
ONE_RATE = "estimates one rate for all groups"
BUILT_ALONE = "create the optimizer yourself and wrap it"
T_WRAPPERS = (
    *("ASAM", "GSAM", "GradNorm", "GradientCentralization", "LookSAM", "PCGrad"),
    *("SAM", "WSAM"),
)
T_WITHOUT = (
    *("CMAES", "DifferentialEvolution", "GeneticAlgorithm"),
    *("ParticleSwarmOptimization", "QuantumAnnealing"),
)
H_WITHOUT = ("PSGDBase", "SAMWrapper", "SOAPBase", "SplitOpt")
BY_CONFIG = (
    *("Adadelta", "Adagrad", "Adam", "Adamax", "BaseOptimizer", "Lion", "Momentum"),
    *("RMSProp", "Radam", "SGD"),
)
REFUSED = {
    "adv_optm.Prodigy_adv": ONE_RATE,
    "prodigyopt.Prodigy": ONE_RATE,
    "torchao.optim.CPUOffloadOptimizer": HOLDS,
    "torch.optim.LBFGS": "takes one parameter group only",
    "timm.optim.Lookahead": HOLDS,
    "transformers.optimization.LayerWiseDummyOptimizer": "rearranges its groups",
    "torch_optimizer.Lookahead": HOLDS,
    "torch_optimizer.RAdam": "keeps one step size for all groups",
    **{
        f"torch_optimizer.A2Grad{name}": "never reads its groups' rates"
        for name in ("Exp", "Inc", "Uni")
    },
    P + "A2Grad": "has parameter groups without lr",
    P + "ASGD": "measures its rates itself",
    P + "AdaLOMO": "steps inside the backward pass",
    P + "AdamMini": BUILT_ALONE,
    P + "AliG": "has parameter groups without lr",
    P + "DAdaptAdaGrad": ONE_RATE,
    P + "DAdaptAdam": ONE_RATE,
    P + "DAdaptAdan": ONE_RATE,
    P + "DAdaptLion": ONE_RATE,
    P + "DAdaptSGD": ONE_RATE,
    P + "FriendlySAM": HOLDS,
    P + "GSAM": HOLDS,
    P + "LBFGS": "takes one parameter group only",
    P + "LOMO": "steps inside the backward pass",
    P + "LoRARite": "steps A and B as one pair out of one group",
    P + "LookSAM": HOLDS,
    P + "Lookahead": HOLDS,
    P + "Magma": HOLDS,
    P + "OrthoGrad": HOLDS,
    P + "PCGrad": HOLDS,
    P + "Prodigy": ONE_RATE,
    P + "SAM": HOLDS,
    P + "SafeFP16Optimizer": HOLDS,
    P + "ScheduleFreeWrapper": HOLDS,
    P + "TRAC": HOLDS,
    P + "WSAM": HOLDS,
    **{f"torchium.optimizers.{name}": HOLDS for name in T_WRAPPERS},
    **{f"torchium.optimizers.{name}": BUILT_ALONE for name in T_WITHOUT},
    "torchium.optimizers.AdaLOMO": "steps inside the backward pass",
    "torchium.optimizers.LBFGS": "takes one parameter group only",
    **{f"nadir.{name}": BUILT_ALONE for name in BY_CONFIG},
    "omnimuon.Muon": "at a second learning rate, matrix_lr",
    "omnimuon.OmniMuon": "at a second learning rate, matrix_lr",
    "muon.Muon": BUILT_ALONE,
    "muon.MuonWithAuxAdam": BUILT_ALONE,
    "muon.SingleDeviceMuonWithAuxAdam": BUILT_ALONE,
    "kron_torch.DistributedKron": BUILT_ALONE,
    "kron_torch.DistributedOneSidedKron": BUILT_ALONE,
    "heavyball.PSGDLRA": BUILT_ALONE,
    **{f"heavyball.{name}": BUILT_ALONE for name in H_WITHOUT},
}

# Classes whose instances cannot take other groups. Only the class itself can be passed.
SNAPSHOTS = {
    "torch_optimizer.AdaBound",
    P + "AdaBound",
    P + "SRMM",
    P + "ScheduleFreeAdamW",
    P + "ScheduleFreeSGD",
}

# Classes whose state has other objects than tensors and numbers. Neither our optimizer's nor
# the native one's state can be loaded with weights_only=True.
PICKLED = {
    P + "AdaShift",
    P + "Conda",
    P + "SCION",
    P + "SCIONLight",
    P + "ScalableShampoo",
}

# Classes whose load_state_dict fails in a new optimizer, or does not restore a generator.
LOADS_NOT = {
    "adv_optm.AdaMuon_adv",
    "adv_optm.Lion_adv",
    "adv_optm.Muon_adv",
    "timm.optim.Adahessian",
    "kron_torch.Kron",
}

# Classes whose step needs CUDA, or fails without our optimizer too.
NO_STEP = {
    "bitsandbytes.optim.AdEMAMix32bit",
    "bitsandbytes.optim.PagedAdEMAMix32bit",
    "bitsandbytes.optim.PytorchLARS",
    "galore_torch.GaLoreAdamW8bit",
    "apollo_torch.GaLoreAdamW8bit",
    "apollo_torch.QAPOLLOAdamW",
    *(f"torchium.optimizers.{name}" for name in ("AdaBound", "AdaMod", "Ranger")),
    "torchium.optimizers.AdaHessian",
    *("muonium.optim.Muon", "muonium.optim.MuonLP"),
    "torchium.optimizers.Yogi",  # the root of a negative number
    # the step needs a gradient of A that is not zero, but at the start it is zero
    *(f"heavyball.{name}" for name in ("LATHER", "PSGDKron", "PSGDPRO", "QSGD")),
}


def classes(package: str) -> dict[str, type[Optimizer]]:
    """Return the optimizer classes of a package by name, or an empty dict if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(package)
        except ImportError:
            return {}
    members = {
        name: value
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value)
    }
    return {
        f"{package}.{n}": v
        for n, v in members.items()
        if issubclass(v, Optimizer) and v is not Optimizer
    }


CLASSES: dict[str, type[Optimizer]] = {}
for package in PACKAGES:
    for key, kind in classes(package).items():
        if kind not in CLASSES.values():  # some packages re-export classes of another
            CLASSES[key] = kind
CASES = {
    key: Case(kind, **NEEDS.get(key, {}))
    for key, kind in CLASSES.items()
    if key not in REFUSED
}
# Settings that are learning rates themselves, or with which a step divides by one.
OTHER_RATES = {
    "torch_optimizer.AdaBound": {"final_lr": 0.02},
    P + "AdaBound": {"final_lr": 0.02},
    P + "GrokFastAdamW": {"normalize_lr": True},
    "optimi.AdamW": {"decouple_lr": True, "weight_decay": 1e-2},
    "optimi.Lion": {"decouple_lr": True, "weight_decay": 1e-2},
    "schedulefree.AdamWScheduleFree": {"warmup_steps": 6},
}
for key, settings in OTHER_RATES.items():
    if key in CASES:
        variant = f"{key} {settings}"
        CASES[variant] = Case(CASES[key].kind, settings)
        SNAPSHOTS |= {variant} if key in SNAPSHOTS else set()
