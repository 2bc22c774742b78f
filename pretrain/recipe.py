"""A recipe: one tree of dataclasses that describes a run completely.

The text under each field is its help on the command line. A recipe file is YAML with these
keys; any of them can be overridden as `--section.key value`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rondo.models.config import ModelConfig
from rondo.parallel.config import ParallelConfig


@dataclass
class SourceConfig:
    """One corpus of a mixture."""

    path: str
    """Prepared folder, text/JSONL/Parquet file or folder, Hugging Face hub name, or an embedded
    corpus (stdlib-english, stdlib-code)."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights."""
    streaming: bool = False
    """Tokenise it while it is trained on, instead of preparing it first: a hub name, JSON lines or
    Parquet. Every rank reads and tokenises all of it."""
    shuffle_buffer: int = 1000
    """Rows that are read and shuffled together where it is streamed."""


@dataclass
class DataConfig:
    """What the model reads, and in what portions."""

    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig("stdlib-english")])
    """The mixture."""
    tokenizer: str = "auto"
    """'bytes', 'sentencepiece:N' (trained on the sources with N pieces), the path of a
    sentencepiece .model or a Hugging Face tokenizer.json, or 'auto': that of the prepared
    sources, bytes when there is none."""
    sequence_length: int = 512
    """Tokens in a sequence."""
    global_batch_size: int = 8
    """Sequences in a step, over all ranks."""
    micro_batch_size: int = 8
    """Sequences a rank runs at once; the rest of its share is accumulated."""
    validation_fraction: float = 0.02
    """Share of documents held out when a source is prepared."""
    max_epochs: float = 0.0
    """A run that would read a source more often is refused; 0: it is only warned of."""
    folder: str = "data"
    """Where sources that are not prepared yet are prepared."""


@dataclass
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "muon"] = "adamw"
    """'muon' takes the matrices of the blocks with Muon and the rest with AdamW."""
    lr: float = 3e-4
    """Peak learning rate; Muon's updates are scaled to the size of AdamW's."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases, decays) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's denominator offset."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down. 0 switches it off."""
    max_skipped_steps: int = 10
    """Consecutive steps with non-finite gradients (each is skipped) before the run stops."""


@dataclass
class ScheduleConfig:
    """Learning rate by step. Ratios are shares of optimizer.lr; lengths are steps (500), tokens
    ("16B tokens") or shares of the run ("1%")."""

    name: Literal[
        "constant",
        "linear",
        "cosine",
        "inv_sqrt",
        "wsd",
        "wsd_s",
        "infinite_cosine",
        "infinite_inv_sqrt",
    ] = "cosine"
    """'wsd' is warm-up, stable, decay; 'wsd_s' goes back to the peak after each of several decays;
    the infinite ones cool down to a constant rate, which needs no end, and anneal from there."""
    warmup_steps: int | str = 0
    """Length of the linear warm-up."""
    start_ratio: float = 0.0
    """Where the warm-up starts."""
    peak_ratio: float = 1.0
    """Where it ends. Below 1 to go on from a decayed rate without warming up again."""
    cooldown_steps: int | str = 0
    """Length of the infinite schedules' way from the peak to the constant rate."""
    constant_ratio: float = 0.55
    """The infinite schedules' constant rate."""
    timescale: float = 10.0
    """How early infinite_inv_sqrt cools down; near 0 it does so linearly."""
    decay_steps: int | str = 0
    """Length of the decay at the end of the run (wsd_s: before each end). 0 means a fifth of the
    run with wsd and wsd_s, or what the warm-up leaves, and no anneal with the infinite ones."""
    decay_shape: Literal[
        "linear", "cosine", "1-sqrt", "exponential", "megatron-exponential", "inverse"
    ] = "1-sqrt"
    """Shape of the decay of wsd and wsd_s; the infinite schedules anneal exponentially."""
    decay_ends: list[int | str] = field(default_factory=list)
    """Steps at which a decay of wsd_s has ended, besides the end of the run."""
    final_ratio: float = 0.1
    """Learning rate at the end of the run, and what inv_sqrt does not go below. Exponential and
    inverse decays, and infinite schedules' anneals, end at a thousandth of what they begin with
    where this is less or 0."""


@dataclass
class ReplayConfig:
    """Samples that were seen before, mixed into a stage (arXiv 2403.08763)."""

    share: float | list[float] = 0.05
    """Of the stage's samples, in every batch; the rest is new. With several sources, that of all
    together (one after the other, or shuffled as one), or a list with that of each."""
    source: str | list[str] = "earlier"
    """Whose samples: an earlier stage by its name, all of them ('earlier'), or another run, by its
    folder (what its newest checkpoint has seen) or that of one of its checkpoints; or a list."""
    order: Literal["original", "reshuffled"] = "original"
    """As they were seen, or shuffled by `seed`."""
    offset: int | list[int] | None = None
    """Samples to pass over at first; they come after the last. A list where `share` is one. None:
    go on behind what earlier stages have replayed of the same source, in the same order."""
    seed: int = 0
    """Of the shuffle."""

    @property
    def sources(self) -> list[str]:
        """`source`, also where it is one."""
        return self.source if isinstance(self.source, list) else [self.source]


@dataclass
class StageDataConfig:
    """What a stage reads."""

    sources: list[SourceConfig] = field(default_factory=list)
    """The mixture; data.sources if empty. A source that an earlier stage has read goes on where
    that left off."""


@dataclass
class StageConfig:
    """A part of a run with data, schedule and length of its own."""

    name: str
    """Names the stage, and its held-out text, in metrics."""
    steps: int | str = "100%"
    """Length: steps (500), tokens ("16B tokens"), or a share of the recipe's steps."""
    data: StageDataConfig = field(default_factory=StageDataConfig)
    schedule: ScheduleConfig | None = None
    """A schedule in place of the recipe's (as a whole: what it leaves out are defaults). It counts
    steps from the beginning of the stage, and shares are shares of the stage."""
    replay: ReplayConfig | None = None
    """Samples from before to mix in."""
    init_from: str | None = None
    """A checkpoint, or a run (its newest), whose parameters the stage begins with, instead of
    those that the stage before ended with."""
    reset_optimizer: bool = True
    """Begin without the optimizer's moments and its step count, else with those of the stage
    before (of `init_from` where it is given)."""
    reset_step: bool = True
    """Begin the schedule anew, else go on in that of the stage before, which then spans both."""


@dataclass
class ReweightConfig:
    """How much each sample counts, by its own loss among those of the same step."""

    strategy: Literal["uniform", "linear", "linupper", "quadratic", "extremes"] = "uniform"
    """What weighs most: everything alike (uniform), high losses (linear; linupper only damps the
    lower half), middling ones (quadratic), or both ends (extremes)."""
    temperature: float = 1.0
    """How even weights are: within a scope no token counts more than exp(1 / temperature) times
    another."""
    warmup_steps: int | str = 0
    """Length of the time before `temperature` holds: steps (500), tokens ("2B tokens") or a share
    of the run ("5%"), all stages together: it grows when a stage is added."""
    warmup: Literal["plain", "step", "linear", "cosine"] = "plain"
    """Until then, the unweighted loss (plain), start_temperature (step), or a way from
    start_temperature to temperature (linear, cosine)."""
    start_temperature: float = 100.0
    """Temperature that a warm-up, if it is not plain, begins with."""
    clip_quantile: float = 0.0
    """Losses below this quantile or above its opposite (0.01: 1% and 99%) count as these, so that
    one outlier does not make all others alike. 0 switches it off."""
    unit: Literal["sequence", "document"] = "sequence"
    """What a sample is: a packed sequence, or each document's part in it."""
    scope: Literal["micro_batch", "global_batch"] = "micro_batch"
    """Among which samples weights are shared out: a micro-batch of all ranks, or the whole step,
    which takes a forward pass over it first."""


@dataclass
class CheckpointConfig:
    """What is kept of a run, and where it starts from."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0 saves the last step only."""
    keep: int = 3
    """How many of the newest checkpoints stay; 0 keeps all."""
    resume: str = "auto"
    """'auto' goes on from the newest valid checkpoint of the run folder; a path (of a checkpoint
    or of a run) is where to start from while the run folder has none; 'never' refuses to run in
    a folder that has one. A folder with checkpoints of which none is valid is refused. The run's
    own checkpoint must be of the same model and optimizer; another run's may differ in which
    parameters are trained and whether experts are balanced by bias."""
    init_from: str | None = None
    """A checkpoint, or a run (its newest), of whose parameters alone a new run begins: optimizer,
    schedule, step and data are its own. Of no effect once the run folder has a checkpoint."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    signal: str = "SIGUSR1"
    """Signal to a rank that, like SIGTERM, leads to a checkpoint and exit code 75 (try again). A
    launcher takes SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP, and sends its ranks SIGTERM."""


@dataclass
class SlurmEvalConfig:
    """What the SLURM jobs that score checkpoints ask for, besides one task each."""

    partition: str | None = None
    """Partition; null takes SLURM's default."""
    account: str | None = None
    """Account."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit of a job, as D-HH:MM:SS."""
    gpus: int = 0
    """GPUs of a job, on one node; as many ranks share its samples."""
    cpus: int = 0
    """CPU cores of a job; 0 takes SLURM's default."""
    sbatch: list[str] = field(default_factory=list)
    """Any other options of sbatch, as [--constraint=h100]."""
    container: str | None = None
    """Image of a container that they run in; null takes that of `rondo launch slurm`, with its
    runtime, mounts and interpreter, and 'none' is without one."""
    runtime: Literal["pyxis", "apptainer"] | None = None
    """What runs the container; null is pyxis, srun's plugin for enroot."""
    mount: list[str] = field(default_factory=list)
    """Folders that the container sees besides the working directory, as SOURCE or SOURCE:TARGET."""
    python: str | None = None
    """Interpreter; null is that of training, or python3 in a container."""


@dataclass
class EvalConfig:
    """Validation during training, and the scoring of checkpoints beside it."""

    every: int = 0
    """Steps between validations; 0 validates only before the first and after the last step. With
    tasks, a checkpoint is saved and scored at each of these steps and at the last."""
    batches: int = 8
    """Global batches of held-out text in one validation."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of `rondo eval` on which checkpoints are scored; [] scores none."""
    where: Literal["loop", "process", "slurm"] = "process"
    """Scored while training waits (loop), in a process beside the first rank, which shares its
    machine (process), or as a SLURM job each (slurm)."""
    limit: int = 0
    """Samples a task; 0 takes all."""
    batch_size: int = 0
    """Sequences that `rondo eval` runs at once; 0 takes its default."""
    data_dir: str | None = None
    """Folder with the files of lm-eval's tasks, as `<task>.jsonl`; null takes them from the Hugging
    Face hub. A relative path is seen from where training is started."""
    text: str | None = None
    """Text for bits_per_byte, positions and needles: a file, a folder, an embedded corpus; null
    takes the default of `rondo eval`."""
    samples: int = 0
    """Texts of each task from a seed, and of positions; 0 takes the default of `rondo eval`."""
    seed: int = 0
    """Seeds those texts."""
    retries: int = 2
    """Failures that one checkpoint's job may have before it is given up."""
    slurm: SlurmEvalConfig = field(default_factory=SlurmEvalConfig)


@dataclass
class LoggingConfig:
    """What is written, and how often."""

    every: int = 1
    """Steps between lines on the console (metrics.jsonl has every step)."""
    norms_every: int = 100
    """Steps between per-layer activation and state norms and, in mixtures of experts, what routers
    do (loads, entropy, balance, gradients by source); 0 switches them off."""
    router_information: bool = False
    """With the norms, also the mutual information of the routers of neighbouring mixtures, and how
    alike the weights of experts are."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


@dataclass
class Recipe:
    """A run."""

    name: str
    """Name of the run's folder."""
    model: ModelConfig
    """The model."""
    steps: int = 1000
    """Optimizer steps; of each stage that does not say otherwise, if there are stages."""
    seed: int = 0
    """Seeds initialisation and data order."""
    output_dir: str = "runs"
    """Folder of run folders."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stages: list[StageConfig] = field(default_factory=list)
    """Parts of the run, one after the other, for continual pretraining; none: one, of all that
    the recipe says."""
    reweight: ReweightConfig = field(default_factory=ReweightConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and matmul operands; parameters, states and updates are float32."""
    compile: bool = False
    """Run each block through torch.compile."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
