"""The one typed schema of every setting, and how YAML files and `--set` overlay it.

Each default lives here and nowhere else. A preset (`configs/NAME.yaml`, installed beside the
package) or a user's file holds only what differs. Unknown keys and wrong types are errors that
name the nearest valid key.
"""

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from omni.errors import OmniError
from omni.system import Shorthand, apply_settings, parse_yaml, shorten, to_dict

__all__ = ["Config", "Term", "load_config", "parse_config", "presets", "to_yaml"]


@dataclass(frozen=True)
class Term(Shorthand):
    """Weight of one loss term: 0 before `begin`, then a linear ramp, constant from `end` on."""

    weight: float = 0.0
    """final weight"""
    begin: float = 0.0
    """start of the ramp, fraction of the run"""
    end: float = 0.0
    """end of the ramp, fraction of the run"""


@dataclass(frozen=True)
class DataConfig:
    """Which frames are read, and at which size they are processed."""

    resolution: int = 384
    """short side of the processing resolution in pixels; 0 keeps the original"""
    start: int = 0
    """first frame read"""
    stop: int = 0
    """frame to stop before; 0 reads to the end"""
    stride: int = 1
    """read every stride-th frame"""


@dataclass(frozen=True)
class FlowConfig:
    """Pairwise correspondences."""

    provider: str = "auto"
    """dis, raft, gmflow, mixed (dis, gmflow), one of a package; auto: raft on a GPU, else dis"""
    weights: str = ""
    """of raft or gmflow (.pth or .safetensors); empty: see `omni weights`"""
    raft: Literal["large", "small"] = "large"
    """RAFT architecture of `weights` or of torchvision's"""
    pairs: Literal["log", "exhaustive"] = "log"
    """log: gaps 1, 2, 4, ... max_gap in both directions; exhaustive: all ordered pairs"""
    max_gap: int = 32
    """longest gap of the log schedule, frames"""
    workers: int = 0
    """threads computing dis flow; 0: one per core"""
    cycle_threshold: float = 1.5
    """forward-backward error (pixels) up to which a correspondence is reliable"""


@dataclass(frozen=True)
class ModelConfig:
    """Bijections and canonical volume (sizes as in docs/method.md)."""

    couplings: int = 6
    """Real-NVP affine couplings, each changing one axis"""
    hidden: int = 64
    """width of the coupling networks"""
    layers: int = 2
    """hidden layers of a coupling network that see the frame code"""
    pre_layers: int = 0
    """hidden layers before the frame code enters"""
    octaves: int = 4
    """octaves of the positional encoding of the two kept coordinates"""
    scale_bound: float = 0.5
    """bound of a coupling's log-scale"""
    identity_start: bool = True
    """zero last layers, so that every bijection starts as the identity"""
    code: Literal["spline", "gabor"] = "spline"
    """frame code: cubic B-spline in time, or the paper's multiplicative filter network"""
    code_dim: int = 32
    """width of the frame code"""
    code_spacing: float = 3.0
    """frames per control point of the spline code"""
    project_code: bool = False
    """a small network per coupling maps the frame code first (paper)"""
    motion: Literal["affine", "none"] = "affine"
    """per-frame global motion composed before the couplings"""
    planes: int = 0
    """evenly spaced depths with an affine motion per frame of their own; 0: none"""
    canonical: Literal["grid", "gabor"] = "grid"
    """canonical network: multi-resolution grid and small network, or the paper's"""
    canonical_hidden: int = 32
    """width of the canonical network"""
    grid_levels: int = 5
    """levels of the canonical grid"""
    grid_base: int = 16
    """cells per axis of the coarsest level"""
    grid_growth: float = 1.7
    """ratio of cells per axis between levels"""
    grid_log2_size: int = 15
    """log2 of the most entries of one level; larger levels are hashed"""
    surface: int = 64
    """cells per axis of the per-frame surface map; 0: no map, uniform depth samples (paper)"""


@dataclass(frozen=True)
class RenderConfig:
    """Samples along a ray. Depth runs from 0 (near) to 2 (far)."""

    samples: int = 4
    """samples per ray"""
    half_width: float = 0.15
    """guided samples lie within this depth of the surface map"""
    occlusion_margin: float = 0.1
    """depth behind the rendered surface from which a point of the field alone is hidden"""


@dataclass(frozen=True)
class SamplingConfig:
    """How a batch of correspondences is drawn."""

    pairs: int = 64
    """frame pairs per step"""
    points: int = 16
    """points per pair"""
    adjacent_share: float = 0.0
    """share of adjacent pairs drawn on top of the schedule (paper: 0.5)"""
    balance_gaps: bool = True
    """draw every gap equally often; else pairs by their number of reliable pixels (paper)"""
    gap_start: int = 32
    """longest gap at the start of the run"""
    gap_end: int = 32
    """longest gap at the end of the run; grows linearly"""
    tracks: float = 0.25
    """share of pairs drawn from integrated chains and imported tracks, at any gap"""
    mining: float = 0.3
    """share of points drawn where the running residual is large"""
    held_out: float = 0.05
    """share of reliable correspondences never trained on"""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of `omni.field.objective` by name, each ramped (see docs/method.md)."""

    robust: bool = True
    """flow residual: pseudo-Huber in units of sigma; else mean absolute pixels (paper)"""
    flow: Term = Term(1.0)
    """rendered against measured correspondence"""
    surface: Term = Term(1.0)
    """target depth against the surface map, and the map against rendered depth"""
    photometric: Term = Term(5.0)
    """rendered against observed colour"""
    constancy: Term = Term(4.0, 0.2, 0.3)
    """the picture around a visible point against that around where it is taken"""
    acceleration: Term = Term(0.05)
    """second difference of 3D trajectories"""
    distortion: Term = Term(0.01)
    """compactness of weights along the ray (mip-NeRF 360)"""
    depth_range: Term = Term(1.0)
    """mapped samples outside the depth range"""
    photometric_difference: Term = Term(0.0)
    """differences of colours of consecutive samples (paper's second colour term)"""
    flow_difference: Term = Term(0.0)
    """differences of targets of consecutive samples (paper)"""


@dataclass(frozen=True)
class OptimConfig:
    """The optimisation loop."""

    steps: int = 10000
    """longest run"""
    lr_mapping: float = 5e-3
    """learning rate of the couplings"""
    lr_code: float = 5e-3
    """learning rate of the frame code"""
    lr_canonical: float = 1e-2
    """learning rate of the canonical volume"""
    lr_surface: float = 1e-2
    """learning rate of the surface maps"""
    lr_motion: float = 1e-3
    """learning rate of the planes' motion, or of the global one where there are no planes"""
    warmup: int = 50
    """steps of linear warm-up"""
    decay: Literal["cosine", "step"] = "cosine"
    """cosine to 2 %; step: halved every fifth of the run (paper)"""
    clip: float = 1.0
    """largest gradient norm of the couplings; 0: none"""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam"""
    evaluate_every: int = 250
    """steps between held-out evaluations"""
    patience: int = 8
    """held-out evaluations without improvement before stopping; 0: never stop early"""
    checkpoint_seconds: float = 60.0
    """seconds between checkpoints"""
    log_every: int = 50
    """steps between scalar summaries"""
    image_every: int = 1000
    """steps between image summaries"""


@dataclass(frozen=True)
class OutputConfig:
    """What `optimize` leaves behind."""

    grid: int = 16
    """stride in original pixels of the exported grid of queries"""
    frame: int = 0
    """frame of the exported grid"""
    chunk: int = 8192
    """points evaluated at once"""
    render_side: int = 128
    """short side of the rendered colour and depth videos"""
    render_frames: int = 60
    """most frames rendered for them, evenly spaced"""


@dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    seed: int = 0
    """seed of every random draw"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    threads: int = 0
    """CPU threads of fit and read-out; 0: one for the fit, torch's choice for the read-out"""
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


_LIMITS: dict[str, tuple[float, float]] = {
    "data.resolution": (0, 1 << 16),
    "data.start": (0, 1 << 40),
    "data.stop": (0, 1 << 40),
    "data.stride": (1, 1 << 20),
    "flow.max_gap": (1, 1 << 20),
    "flow.workers": (0, 1024),
    "flow.cycle_threshold": (1e-3, 1e3),
    "threads": (0, 1024),
    "model.couplings": (1, 64),
    "model.hidden": (1, 4096),
    "model.layers": (1, 64),
    "model.pre_layers": (0, 64),
    "model.octaves": (0, 16),
    "model.scale_bound": (1e-3, 16),
    "model.code_dim": (1, 4096),
    "model.code_spacing": (0.5, 1e4),
    "model.planes": (0, 1024),
    "model.canonical_hidden": (1, 4096),
    "model.grid_levels": (1, 32),
    "model.grid_base": (2, 1 << 12),
    "model.grid_growth": (1, 8),
    "model.grid_log2_size": (3, 28),
    "model.surface": (0, 1 << 12),
    "render.samples": (1, 1024),
    "render.half_width": (1e-4, 2),
    "render.occlusion_margin": (1e-6, 2),
    "sampling.pairs": (1, 1 << 20),
    "sampling.points": (1, 1 << 20),
    "sampling.adjacent_share": (0, 1),
    "sampling.gap_start": (1, 1 << 20),
    "sampling.gap_end": (1, 1 << 20),
    "sampling.tracks": (0, 0.9),
    "sampling.mining": (0, 1),
    "sampling.held_out": (0, 0.9),
    "optim.steps": (1, 1 << 40),
    "optim.lr_mapping": (0, 10),
    "optim.lr_code": (0, 10),
    "optim.lr_canonical": (0, 10),
    "optim.lr_surface": (0, 10),
    "optim.lr_motion": (0, 10),
    "optim.warmup": (0, 1 << 40),
    "optim.clip": (0, 1e9),
    "optim.evaluate_every": (1, 1 << 40),
    "optim.patience": (0, 1 << 40),
    "optim.checkpoint_seconds": (0, 1e9),
    "optim.log_every": (1, 1 << 40),
    "optim.image_every": (1, 1 << 40),
    "output.grid": (1, 1 << 16),
    "output.frame": (0, 1 << 40),
    "output.chunk": (16, 1 << 24),
    "output.render_side": (16, 1 << 14),
    "output.render_frames": (1, 1 << 20),
}
"""Smallest and largest sensible value of every number that has one."""

_RETIRED: dict[str, Any] = {"flow.refine": True}
"""Settings of older versions, and the value that omni has had for them ever since."""

_LONGEST_YAML = 1 << 20

PRESET_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def presets() -> list[str]:
    """Names of the presets in `configs/`."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def load_config(base: Config | str = "", overrides: typing.Sequence[str] = ()) -> Config:
    """Resolve a preset or YAML file plus `key=value` overrides into a `Config`.

    Args:
        base: a Config, a preset's name, a path to a YAML file, or empty for the defaults.
        overrides: `section.key=value` texts; the value is read as YAML.

    Raises:
        OmniError: file missing or unreadable, unknown key, wrong type.
    """
    config = base if isinstance(base, Config) else Config()
    if isinstance(base, str) and base:
        config = apply_settings(config, _without_retired(_read_yaml(base), base), where=base)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise OmniError(f"--set {shorten(text)} is not of the form section.key=value")
        tree: Any = parse_yaml(value, f"--set {shorten(text)}")
        for part in reversed(key.strip().split(".")):
            tree = {part: tree}
        config = apply_settings(config, tree, where="--set")
    _check_limits(config)
    return config


def parse_config(tree: Any, where: str) -> Config:
    """Settings from an untrusted nested mapping, which an older version may have written.

    Args:
        tree: what a YAML file or a checkpoint holds.
        where: what to call it in messages.

    Raises:
        OmniError: unknown key, wrong type, value out of range, or a retired setting's other value.
    """
    config = apply_settings(Config(), _without_retired(tree, where), where)
    _check_limits(config)
    return config


def _without_retired(tree: Any, where: str) -> Any:
    for name, value in _RETIRED.items():
        section, key = name.split(".")
        part = tree.get(section) if isinstance(tree, dict) else None
        if not isinstance(part, dict) or key not in part:
            continue
        if part[key] != value:
            raise OmniError(
                f"{where}: {name} is always {value} in this version, not {shorten(part[key])}: "
                "use a new run folder, or the version that wrote it"
            )
        tree = {**tree, section: {k: v for k, v in part.items() if k != key}}
    return tree


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text that `load_config` reads back to an equal object."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _check_limits(config: Config) -> None:
    for name, (low, high) in _LIMITS.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        if not low <= value <= high:
            raise OmniError(f"{name} must lie between {low:.12g} and {high:.12g}, not {value:.12g}")


def _read_yaml(name: str) -> dict:
    path = Path(name)
    if name in presets():
        path = PRESET_FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(presets())
        raise OmniError(f"config {name!r} is neither a file nor a preset (presets: {known})")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST_YAML + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise OmniError(f"config {path} cannot be read: {error}") from None
    if len(text) > _LONGEST_YAML:
        raise OmniError(f"config {path} is no config: it is larger than {_LONGEST_YAML} bytes")
    tree = parse_yaml(text, f"config {path}")
    return {} if tree is None else tree
