"""The whole run as one typed tree, checked before anything starts; ``ideal.config.file`` reads it.

Each field says its unit, its default and where the default comes from. ``resources`` and ``tracking`` say where and
how fast a run happens, never what it computes: they are no part of any stage's fingerprint.

Sources named below: *paper* is IDEAL (arXiv 2505.12762), *K-FAC* is Martens & Grosse 2015.
"""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlparse

from pydantic import Field, model_validator

from ideal.config.inputs import BenchmarkConfig, DomainConfig, ModelConfig, Name, Options, PositiveInt, Section

Solver = Literal["identity", "adam", "kfac", "ekfac", "exact"]
Decided = Literal["bf16", "fp32"]
Precision = Literal["auto", "bf16", "fp32"]
"""Of arithmetic; `auto` is decided by the hardware (``ideal.model.precision``) before anything depends on it."""


class LoraConfig(Section):
    """Low-rank adapters that are trained in place of the weights (``ideal.model.lora``)."""

    rank: PositiveInt = Field(16, description="r, the width between A and B.")
    alpha: PositiveInt = Field(32, description="α: what an adapter adds is multiplied by alpha / rank.")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Linear layers that get one, by the end of their names (`q_proj`). Default: all but the head.",
    )


class SftConfig(Section):
    """Supervised fine-tuning: AdamW, linear warm-up, then decay."""

    epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the mixture (paper: 1 and 3).")
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate (paper: 1e-5).")
    batch_examples: PositiveInt = Field(64, description="Examples in a step, over all workers.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps with rising learning rate.")
    decay: Literal["cosine", "linear", "constant"] = Field("cosine", description="What follows the warm-up.")
    final_rate: float = Field(0.1, ge=0, le=1, description="Learning rate at the end, as share of the peak.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay, per unit of learning rate.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment (PyTorch's default).")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's second moment; short runs need less than 0.999.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of the whole gradient.")
    precision: Precision = Field(
        "auto",
        description="Arithmetic of forward and backward, and of the benchmarks' engine; `auto`: bf16 where the "
        "processor or GPU has it natively, else fp32. Master weights and moments are always fp32.",
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train adapters of low rank; their learning rate is ten times or more a whole model's. Default: "
        "all weights are trained.",
    )

    def of_the_weights(self) -> dict[str, Any]:
        """The settings that trained weights depend on."""
        return self.model_dump(mode="json", exclude_none=True)


class InfluenceConfig(Section):
    """How each domain moves each reference loss at θ_t."""

    solver: Solver = Field(
        "kfac",
        description="`kfac`, `ekfac`: inverse Kronecker-factored curvature, layer by layer. `adam`: the optimiser's "
        "own diagonal. `identity`: plain gradient products. What each is worth: `ideal fidelity`, which alone has "
        "`exact`: the curvature of all tracked layers together, by conjugate gradients in one process.",
    )
    joint: bool = Field(
        True,
        description="Combine the layers' solutions anew, under the curvature of all of them together: the solver's for "
        "the reference sets, and for the domains what the optimiser's own diagonal makes of their gradients.",
    )
    averaged: float = Field(
        0.67,
        ge=0,
        le=1,
        description="Influence is computed at the mean of SFT's weights after this share of its steps, the last ones, "
        "where their noise has gone; 0: at the trained model itself.",
    )
    fisher: Literal["sampled", "empirical"] = Field(
        "sampled", description="Labels of the factors' gradients: drawn from the model, or the data's."
    )
    damping: Annotated[float, Field(gt=0)] | Literal["schedule"] = Field(
        1.0,
        description="λ as a multiple of a layer's mean eigenvalue, or `schedule`: what AdamW's own steps damp with, "
        "(√v̂ + ε) / (sum of learning rates, each times what clipping left of its gradient).",
    )
    curvature_examples: PositiveInt = Field(
        64,
        description="Examples of the sample, as many of each domain, that `joint` and `exact` see the curvature on.",
    )
    products: PositiveInt = Field(
        8, description="Most curvature products of `exact` for each reference set; fewer leave a larger residual."
    )
    residual: float = Field(0.05, gt=0, lt=1, description="Relative residual at which `exact` is content.")
    layers: list[str] = Field(
        ["*.mlp.*"], min_length=1, description="Patterns of tracked linear layers; never embeddings or the head."
    )
    examples: PositiveInt = Field(
        256, description="Training examples of each domain in the sample for gradients and factors."
    )
    blocks: int = Field(8, ge=2, description="Parts that every set is split in; the bootstrap resamples them.")
    confidence: float = Field(0.9, gt=0, lt=1, description="Level of the bootstrap intervals.")
    resamples: PositiveInt = Field(2000, description="Bootstrap resamples.")
    widening: float = Field(
        1.0,
        gt=0,
        description="Of the bootstrap's intervals, which know of sampling only; `ideal fidelity` says what they lack.",
    )
    precision: Precision = Field(
        "auto", description="Arithmetic of the model's passes, as SFT's; products and sums are always fp32."
    )

    sample: Literal["first", "next"] = Field(
        "first",
        description="Which examples stand for a domain: `first`: some that the mixture trains on. `next`: those that a "
        "larger volume would add, which no epoch has learned by heart: better with several epochs.",
    )

    def of_the_table(self) -> dict[str, Any]:
        """The settings that an influence table depends on; the others are of its intervals, or of `exact` alone."""
        other = {"confidence", "resamples", "widening"}
        return self.model_dump(
            mode="json", exclude=other if self.solver == "exact" else other | {"products", "residual"}
        )

    @model_validator(mode="after")
    def _no_block_is_empty(self) -> InfluenceConfig:
        if self.examples < self.blocks:
            raise ValueError(f"`examples` ({self.examples}) must be at least `blocks` ({self.blocks})")
        return self


class EquilibriumConfig(Section):
    """How influences become volumes."""

    rule: Literal["balanced", "paper"] = Field(
        "balanced", description="`balanced` keeps the total volume; `paper` lets it grow or shrink."
    )
    objective: Literal["macro", "micro"] = Field(
        "macro", description="Mean over reference sets, or over their supervised tokens."
    )
    iterations: int = Field(3, ge=1, le=20, description="Updates of the mixture: 2 gives D0, D1, D2 (paper: 2).")
    m: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Largest relative change of a volume in one iteration (paper: 0.15); of a rise, times `growth`.",
    )
    growth: float = Field(
        1.0,
        ge=1,
        description="How many times m a volume may grow by in one iteration. With the total kept, large domains "
        "can give no more than small ones may take: 4 lets one round go about as far as two.",
    )
    normalise: Literal["largest", "mean"] = Field(
        "mean",
        description="Which domain moves by m: `largest`: the one of the largest influence alone (paper). `mean`: every "
        "one of at least the mean influence, so that a single domain doesn't take the whole step.",
    )
    sure: float = Field(
        0.75,
        ge=0.5,
        le=1,
        description="A run goes on while some domain is worth more or less than the others with this confidence, their "
        "number allowed for; of influences that are noise alone 1 - `sure` go on. The best mixture is kept, so a "
        "step too many costs time, and a run that stops too early gains nothing.",
    )
    floor: int = Field(1, ge=1, description="Smallest volume of a domain, in examples.")
    max_copies: float = Field(4.0, ge=1, description="Most copies of one example in a mixture.")
    tolerance: float = Field(0.01, ge=0, description="Stop when no volume would change by more, relatively.")
    max_rise: float = Field(
        0.0,
        ge=0,
        description="Largest relative rise of the reference loss that is still accepted: what two trainings of one "
        "mixture differ by.",
    )
    retries: int = Field(1, ge=0, le=5, description="Retreats with m/2 after a mixture that raised the reference loss.")


class MethodsConfig(Section):
    """What the ways to choose a mixture, other than `equilibrium`, are set to (``ideal/methods``)."""

    domain: Name | None = Field(None, description="The one domain that `specific` trains on.")
    concentration: float = Field(
        1.0,
        gt=0,
        description="Of random mixtures about D0 (`random`, `merge`): their Dirichlet parameters sum to this "
        "times the number of domains.",
    )
    doremi_rate: float = Field(1.0, gt=0, description="DoReMi's η (its paper: 1).")
    doremi_smoothing: float = Field(1e-3, ge=0, lt=1, description="DoReMi's ε (its code: 1e-3).")
    doge_drive: float = Field(
        60.0,
        gt=0,
        description="DOGE's step: the sum of the proxy's learning rates divided by μ (its code: 60 with targets apart "
        "from the domains, of 10,000 steps).",
    )
    merge_candidates: int = Field(32, ge=2, description="Mixtures that `merge` evaluates.")
    regmix_runs: int = Field(32, ge=8, description="Short trainings that `regmix` learns from.")
    regmix_share: float = Field(0.25, gt=0, le=1, description="Of the total volume, that each of them has.")
    regmix_regressor: Literal["lightgbm", "ridge"] = Field(
        "lightgbm", description="What `regmix` fits to them: `lightgbm` (its code); `ridge` on shares and their roots."
    )


class FidelityConfig(Section):
    """How `ideal fidelity` compares predicted with actual changes."""

    seeds: int = Field(8, ge=4, description="Repetitions: draws, data order and sampled labels.")
    change: float = Field(0.4, gt=0, lt=1, description="Relative change of a volume, up and down.")
    modes: list[Literal["steps", "epochs"]] = Field(
        ["steps", "epochs"], min_length=1, description="What is kept when a volume changes: the total, or the others."
    )
    solvers: dict[Name, Options] = Field(
        {
            "identity": {"solver": "identity", "joint": False},
            "adam": {"solver": "adam", "joint": False},
            "kfac": {"solver": "kfac", "joint": False},
            "ekfac": {"solver": "ekfac", "joint": False, "damping": 0.1},
            "joint": {"solver": "kfac", "joint": True, "damping": 1.0},
            "exact": {"solver": "exact", "damping": "schedule"},
        },
        min_length=1,
        description="What is compared: a name, and what it changes in the section `influence`.",
    )


class ResourcesConfig(Section):
    """Where a run happens and how fast; never what it computes."""

    address: str | None = Field(
        None, description="Ray address. Default: RAY_ADDRESS, else a Ray of its own on this machine."
    )
    gpus: int | None = Field(None, ge=0, description="GPUs the run needs. Default: those there are, and none is fine.")
    sft_workers: PositiveInt | None = Field(
        None, description="Data-parallel SFT workers. Default: one per GPU, or one with all CPUs."
    )
    influence_workers: PositiveInt | None = Field(
        None, description="Influence actors. Default: one per GPU, or one per CPU up to 8."
    )
    benchmark_workers: PositiveInt = Field(1, description="vLLM engines that share the benchmarks.")
    tensor_parallel: PositiveInt = Field(
        1, description="GPUs of each vLLM engine, for a model that needs more than one."
    )
    layer_blocks: PositiveInt | None = Field(
        None, description="Parts the tracked layers are cut in. Default: as few as fit in memory."
    )
    batch_tokens: PositiveInt = Field(2048, description="Tokens, padding included, in one forward pass of a worker.")
    shard: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Divide SFT's weights, gradients and moments among its workers (FSDP2). `auto`: where one worker "
        "can't hold them.",
    )
    gradient_checkpointing: bool = Field(False, description="Less SFT memory for a third more time.")
    checkpoint_steps: PositiveInt = Field(
        200, description="SFT steps between checkpoints that a retried run resumes from."
    )
    wait_seconds: PositiveInt = Field(120, description="Longest wait for the cluster's resources, in seconds.")
    working_folder: str | None = Field(
        None,
        description="Where stages are worked on if `storage` is a URL: a folder that all nodes share. Default: one for "
        "each URL in ~/.ideal.",
    )
    vllm_gpu_share: float = Field(
        0.85, gt=0, le=1, description="Share of each GPU's memory that vLLM takes, weights and cache together."
    )
    vllm_cpu_cache: float = Field(
        1.0, gt=0, description="GiB of vLLM's key-value cache, beside the weights, where it runs on the CPU."
    )


class TrackingConfig(Section):
    """Where MLflow keeps the records."""

    uri: str | None = Field(
        None, description="MLflow server. Default: MLFLOW_TRACKING_URI, else an SQLite file in `storage`."
    )
    experiment: str = Field("ideal", description="MLflow experiment's name.")


class Config(Section):
    """A full optimisation run."""

    name: Name = Field(description="The run's name.")
    seed: int = Field(0, ge=0, description="Seed of draws, data order, sampled labels and the bootstrap.")
    storage: str = Field(
        "~/.ideal",
        description="Folder for stages, reports and the embedded MLflow, shared by all nodes; or a URL "
        "(s3://bucket/prefix) that every recorded stage and report is copied to, and fetched from.",
    )
    model: ModelConfig = Field(ModelConfig(), description="The base model.")
    domains: list[DomainConfig] = Field(min_length=2, description="The capabilities that are mixed.")
    benchmarks: list[BenchmarkConfig] = Field(min_length=1, description="What every checkpoint is scored on.")
    sft: SftConfig = Field(SftConfig(), description="Fine-tuning.")
    influence: InfluenceConfig = Field(InfluenceConfig(), description="Influence functions.")
    equilibrium: EquilibriumConfig = Field(EquilibriumConfig(), description="The update of the mixture.")
    method: Literal[
        "equilibrium",
        "joint",
        "base",
        "uniform",
        "leave_one_out",
        "specific",
        "random",
        "doremi",
        "doge",
        "merge",
        "regmix",
    ] = Field("equilibrium", description="Way to choose the mixture: this project's own, or one to compare it with.")
    methods: MethodsConfig = Field(MethodsConfig(), description="Settings of the other methods.")
    fidelity: FidelityConfig = Field(FidelityConfig(), description="How far influence can be trusted.")
    allow_code_execution: bool = Field(
        False, description="Let benchmarks run model-written code, in the sandbox, and code in `include` folders, here."
    )
    max_rejected: float = Field(0.05, ge=0, le=1, description="Largest share of a source's rows that may be unusable.")
    resources: ResourcesConfig = Field(ResourcesConfig(), description="Where and how fast.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        for what, names in (
            ("domains", [d.name for d in self.domains]),
            ("benchmarks", [b.name for b in self.benchmarks]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what}: the name {twice[0]!r} stands twice")
        return self

    @model_validator(mode="after")
    def _the_method_fits(self) -> Config:
        names = [domain.name for domain in self.domains]
        if self.methods.domain not in (None, *names):
            raise ValueError(
                f"methods.domain: there is no domain {self.methods.domain!r}; there are {', '.join(names)}"
            )
        if self.method == "specific" and self.methods.domain is None:
            raise ValueError("`method: specific` needs methods.domain, the domain that is trained on")
        if self.method in ("doremi", "doge") and self.sft.batch_examples < len(names):
            raise ValueError(f"`method: {self.method}` needs sft.batch_examples of {len(names)}, one for each domain")
        return self

    @model_validator(mode="after")
    def _adapters_are_not_divided(self) -> Config:
        if self.sft.lora and self.resources.shard == "always":
            raise ValueError("resources.shard: `always` divides whole models; it can't be had with sft.lora")
        return self

    @model_validator(mode="after")
    def _the_solver_is_a_runs(self) -> Config:
        if self.influence.solver == "exact":
            raise ValueError(
                "influence.solver: `exact` is a reference that `ideal fidelity` holds the others against, in one "
                "process (fidelity.solvers); take `kfac` or `ekfac` here"
            )
        return self

    @model_validator(mode="after")
    def _compared_solvers_are_valid(self) -> Config:
        for name in self.fidelity.solvers:
            self.compared(name)
            if self.fidelity.solvers[name].get("precision") == "auto":
                raise ValueError(f"fidelity.solvers.{name}: leave `precision: auto` to the section `influence`")
        return self

    @model_validator(mode="after")
    def _generated_sets_are_disjoint(self) -> Config:
        """reasoning-gym makes item i of a set from the number seed + i, so two sets overlap where these ranges do."""
        parts = [
            (f"domains.{d.name}.{part}", getattr(d, part)) for d in self.domains for part in ("train", "reference")
        ]
        made: list[tuple[str, str, range]] = []
        for where, source in [*parts, *((f"benchmarks.{b.name}", b) for b in self.benchmarks)]:
            if source.reasoning_gym:
                shots = getattr(source, "num_fewshot", 0) or 0
                numbers = range(source.seed, source.seed + source.size + shots)
                for other, task, taken in made:
                    if task == source.reasoning_gym and numbers.start < taken.stop and taken.start < numbers.stop:
                        raise ValueError(
                            f"{where} and {other} share items of {task}: a set takes the seeds "
                            f"{numbers.start} to {numbers.stop - 1}; move its seed"
                        )
                made.append((where, source.reasoning_gym, numbers))
        return self

    def compared(self, name: str) -> InfluenceConfig:
        """The influence section of one of the solvers that `ideal fidelity` compares."""
        return InfluenceConfig.model_validate({**self.influence.model_dump(), **self.fidelity.solvers[name]})

    @property
    def undecided(self) -> bool:
        """Whether a precision is still `auto`: then nothing can be computed, or named by a fingerprint."""
        return "auto" in (self.sft.precision, self.influence.precision)

    def decided(self, precision: Decided) -> Config:
        """The config with this precision wherever it says `auto`."""

        def of(section: Any) -> Any:
            return section.model_copy(update={"precision": precision}) if section.precision == "auto" else section

        return self.model_copy(update={"sft": of(self.sft), "influence": of(self.influence)})

    @model_validator(mode="after")
    def _no_secret_is_in_the_storages_url(self) -> Config:
        if self.is_remote and urlparse(self.storage).username is not None:
            raise ValueError("storage: a URL holds no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return self

    @model_validator(mode="after")
    def _storage_is_a_place(self) -> Config:
        try:
            root = self.root
        except RuntimeError as error:  # a home folder of nobody
            raise ValueError(f"storage: {error}") from None
        if root.exists() and not root.is_dir():
            raise ValueError(f"storage: {root} is no folder")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether storage is a URL."""
        return "://" in self.storage

    @property
    def root(self) -> Path:
        """The storage folder, absolute; of a URL, the one on this cluster that stages are worked on in."""
        folder = self.storage
        if self.is_remote:
            folder = self.resources.working_folder or f"~/.ideal/{sha256(self.storage.encode()).hexdigest()[:12]}"
        return Path(os.path.expandvars(folder)).expanduser().absolute()
