"""One vLLM engine as an lm-eval model, with weights that can be exchanged while it runs.

Starting an engine takes tens of seconds and exchanging its weights takes less than one, so an engine
is started once and scores every checkpoint of its shape. Of adapters it holds their base and takes them up beside it,
unmerged. The environment that vLLM reads is set before it is
imported: this module imports it inside its functions alone.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from safetensors import SafetensorError, safe_open
from tqdm.asyncio import tqdm_asyncio
from transformers import AutoConfig

from ideal.config.config import Precision
from ideal.errors import BadInput
from ideal.model.files import is_adapter
from ideal.model.lora import base_of, sizes_of
from ideal.model.precision import ByPrecision

if TYPE_CHECKING:
    import torch
    from vllm import LLM, RequestOutput, SamplingParams

DEFAULT_NEW_TOKENS = 256
DTYPES = ByPrecision[Literal["bfloat16", "float32"]](bf16="bfloat16", fp32="float32")
ADAPTER = 1
"""vLLM's number of the adapters that an engine has taken up."""

Scored = tuple[tuple[str, str] | None, list[int], list[int]]


def start_engine(
    folder: Path,
    *,
    max_tokens: int,
    gpu_share: float,
    cpu_cache: float,
    gpus: int,
    precision: Precision = "bf16",
) -> LLM:
    """Start an engine in this process. It keeps `OMP_NUM_THREADS` threads busy on a CPU.

    Args:
        folder: a model, or adapters of one, and its tokenizer in the transformers format.
        max_tokens: longest prompt and answer together, in tokens; at most what the model was made for.
        gpu_share: share of each GPU's memory.
        cpu_cache: GiB of key-value cache on a CPU.
        gpus: that the model is divided among; 0: on the CPU.
        precision: of weights and arithmetic.

    Raises:
        BadInput: the folder holds no model that vLLM can run, or the memory doesn't suffice.
    """
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm import LLM

    base = base_of(folder)
    try:
        longest = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", max_tokens)
        return LLM(
            model=str(base),
            dtype=DTYPES[precision],
            max_model_len=min(max_tokens, longest),
            enforce_eager=not gpus,
            tensor_parallel_size=max(1, gpus),
            disable_log_stats=True,
            additional_config={"tensors": _tensors(folder)},
            **({"gpu_memory_utilization": gpu_share} if gpus else {"kv_cache_memory_bytes": int(cpu_cache * 2**30)}),
            **(_room(folder) if is_adapter(folder) else {}),
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise BadInput(
            str(folder),
            f"vLLM can't serve this model: {' '.join(str(error).split())}",
            "check the model folder, `model.max_tokens` and "
            f"`resources.{'vllm_gpu_share' if gpus else 'vllm_cpu_cache'}`",
        ) from error


def _room(folder: Path) -> dict[str, Any]:
    """What makes room for adapters like the folder's: none at the head, whose adapter vLLM gives the logits of all
    prompts as if they were of one."""
    from vllm.config.lora import MaxLoRARanks

    (rank, targets), known = sizes_of(folder), sorted(get_args(MaxLoRARanks))
    if rank > known[-1]:
        raise ValueError(f"adapters of rank {rank}; it takes {known[-1]} at most")
    enough = next(each for each in known if each >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": enough, "lora_target_modules": targets}


def reload(llm: LLM, folder: Path) -> None:
    """Exchange the engine's weights, or adapters, for those in `folder`, and drop what the old ones left in its cache.

    Raises:
        BadInput: the folder's weights can't be read or aren't of the engine's model, which keeps its own.
    """
    ours = cast("dict[str, Any]", llm.llm_engine.vllm_config.additional_config)["tensors"]
    theirs = _tensors(folder)
    if ours != theirs:
        odd = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise BadInput(
            str(folder),
            f"isn't of the running engine's model: {odd} is {theirs.get(odd, 'missing')}, not {ours.get(odd, 'there')}",
            "score checkpoints of one base model with one engine",
        )
    if is_adapter(folder):
        llm.llm_engine.remove_lora(ADAPTER)  # those that requests name are taken up then
    else:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if llm.llm_engine.vllm_config.device_config.device_type == "cpu":
            llm.apply_model(_repack_head)
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM didn't drop its prefix cache: requests are still running")


def _repack_head(model: torch.nn.Module) -> None:
    """Renew the head's packed copy of tied embeddings, which vLLM's own reload leaves as it was on a CPU."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _tensors(folder: Path) -> dict[str, list[int]]:
    """Shape of each tensor a checkpoint needs; of tied embeddings, the output side isn't needed.

    vLLM itself only warns of tensors that a checkpoint lacks, and keeps the old ones.
    """
    try:
        tied = AutoConfig.from_pretrained(base_of(folder), local_files_only=True).tie_word_embeddings
        shapes: dict[str, list[int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.offset_keys()}
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(str(folder), f"can't be read as a checkpoint: {reason}", "train it again") from error
    return {name: shape for name, shape in shapes.items() if not (tied and name == "lm_head.weight")}


class VllmModel(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of an engine: greedy answers and log-likelihoods.

    Args:
        llm: a running engine.
        seed: of sampling, for tasks that ask for it; what the engine did before doesn't matter.
        progress: called with requests finished and requests in all, as they finish; may be exchanged.
        adapter: the folder that the engine was started on or that was reloaded, if it holds adapters.
    """

    def __init__(
        self,
        llm: LLM,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        adapter: Path | None = None,
    ) -> None:
        super().__init__()
        self.llm, self.seed, self.adapter = llm, seed, adapter
        self.progress = progress
        self.tokenizer: Any = llm.get_tokenizer()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    @property
    def max_gen_toks(self) -> int:
        """Longest answer of a task that sets none, in tokens."""
        return DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of a text. A text that already starts with the BOS token gets no second one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to its first stop string. Prompts that are too long lose their beginning."""
        from vllm import SamplingParams

        prompts, settings, stops = [], [], []
        for number, (context, given) in enumerate(request.args for request in requests):
            wanted: dict[str, Any] = dict(normalize_gen_kwargs(given, default_max_gen_toks=self.max_gen_toks))
            until = handle_stop_sequences(wanted.pop("until", None), eos=self.tok_decode([self.eot_token_id]))
            new_tokens = min(int(wanted.pop("max_gen_toks")), self.max_length - 1)
            wanted.pop("do_sample", None)
            if wanted.setdefault("temperature", 0.0) > 0:
                wanted.setdefault("seed", self.seed + number)
            prompt, new_tokens = maybe_truncate(
                self.tok_encode(context), max_gen_toks=new_tokens, max_model_len=self.max_length
            )
            prompts.append(prompt)
            stops.append(until)
            settings.append(
                SamplingParams(
                    max_tokens=new_tokens,
                    stop=until,
                    skip_special_tokens=False,
                    spaces_between_special_tokens=False,
                    **wanted,
                )
            )
        outputs = self._run(prompts, settings)
        return [
            postprocess_generated_text(output.outputs[0].text, until, None)
            for output, until in zip(outputs, stops, strict=True)
        ]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, in nats, and whether greedy decoding would give it."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats; long ones are scored in windows."""
        windows: list[Scored] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,
                context_len=1,
            )
            cut = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += cut
            counts.append(len(cut))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: list[Scored], **_: Any) -> list[tuple[float, bool]]:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        prompts = [(context + answer)[1 - self.max_length :] for _, context, answer in requests]
        outputs = self._run(prompts, [settings] * len(prompts))
        return [_score(output, len(answer)) for output, (_, _, answer) in zip(outputs, requests, strict=True)]

    def _run(self, prompts: list[list[int]], settings: list[SamplingParams]) -> list[RequestOutput]:
        from vllm import RequestOutput, TokensPrompt
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", ADAPTER, str(self.adapter)) if self.adapter else None
        asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        self.llm.enqueue(asked, settings, lora_request=adapter, use_tqdm=False)
        bar = partial(_Progress, self.progress) if self.progress else False
        return self.llm.wait_for_completion(RequestOutput, use_tqdm=bar)


class _Progress(tqdm_asyncio):  # type: ignore[type-arg]
    """vLLM's progress bar, which calls instead of printing, ten times a second at most."""

    monitor_interval = 0

    def __init__(self, report: Callable[[int, int], None], **bar: Any) -> None:
        self.report = report
        super().__init__(**bar, file=io.StringIO(), disable=False)

    def display(self, *_: Any, **__: Any) -> None:
        self.report(int(self.n), int(self.total or 0))


def _score(output: RequestOutput, answer_tokens: int) -> tuple[float, bool]:
    """Log-likelihood of the prompt's last tokens, and whether each of them is the likeliest."""
    total, greedy = 0.0, True
    ids, choices = cast("list[int]", output.prompt_token_ids), cast("list[Any]", output.prompt_logprobs)
    for token, choice in zip(ids[-answer_tokens:], choices[-answer_tokens:], strict=True):
        total += choice[token].logprob
        greedy &= choice[token].logprob >= max(each.logprob for each in choice.values())
    return total, greedy
