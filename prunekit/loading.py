"""Models by name: a short name that a plugin brings, a folder, or a hub id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit import plugins
from prunekit.errors import InputError, PrunekitError, UnknownName, did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from prunekit.strategy.decisions import ModelShape

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Files of a model folder that can change an answer: weights, configs, tokenizer, processor, chat template.
MATTERS = {".json", ".jinja", ".safetensors", ".bin", ".model", ".txt"}
WHOLE = 256 * 2**20
BLOCK, BLOCKS = 2**20, 64
DTYPES = ("float32", "bfloat16", "float16", "float64")


def resolve(name: str | Path) -> Path | str:
    """Where a model is: a folder, or a hub id that is looked for in the local cache.

    A short name such as `micro` comes from the hook `prunekit_models`. Raises InputError for a folder without a
    `config.json`, and UnknownName, with suggestions, for a name that is neither registered, a folder nor a hub id.
    """
    text = str(name)
    registry = plugins.registry()
    short = tuple(entry.name for entry in registry.models())
    if isinstance(name, str) and name in short:
        path = _call(name)
    elif Path(name).exists():
        path = Path(name)
    elif isinstance(name, str) and HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    elif "/" in text or "\\" in text or isinstance(name, Path):
        raise InputError(f"no such model folder: '{text}' (name a folder, a hub id such as org/name, or a short name)")
    else:
        raise UnknownName("model", text, short)
    if not (path / "config.json").is_file():
        raise InputError(f"'{path}' is no model folder: it has no config.json")
    return path


def load(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn: str | None = None,
    download: bool = False,
    device_map: str | Mapping[str, int | str] | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in evaluation mode, with its processor.

    dtype: None takes float32 on the CPU and the checkpoint's own elsewhere. device: None takes a GPU if there is one.
    attn: transformers' `attn_implementation`; None takes its default. download: whether a hub may be asked.
    device_map: transformers' own, in the place of `device`: which parts are kept on which device; accelerate brings
    those on `cpu` or `disk` to where they compute.
    Images are always prepared by the PIL backend, so that scores do not depend on what else is installed.
    Raises InputError when the model is not there, is not a vision-language model, lacks weights or has more than its
    config knows, or for an unknown dtype or device.
    """
    import transformers

    auto: Any = transformers  # its factories are not typed
    path = resolve(name)
    target = device_of(device)
    kind = dtype_of(dtype) if dtype is not None else ("auto" if target.type != "cpu" else dtype_of("float32"))
    extra: dict[str, Any] = {"attn_implementation": attn} if attn else {}
    if device_map is not None:
        extra["device_map"] = device_map
    _check_present(name, path)
    with _explained(path, download):
        local: dict[str, Any] = {"local_files_only": not download}
        processor = auto.AutoProcessor.from_pretrained(path, backend="pil", **local)
        model, loaded = auto.AutoModelForImageTextToText.from_pretrained(
            path, dtype=kind, output_loading_info=True, **local, **extra
        )
    _check_weights(path, loaded)
    return (model if device_map is not None else model.to(target)).eval(), processor


def _check_present(name: str | Path, path: Path | str) -> None:
    """Raise InputError for a folder with a config and no weights."""
    kinds = ("*.safetensors", "*.bin", "*.safetensors.index.json")
    if isinstance(path, Path) and not any(one for kind in kinds for one in path.glob(kind)):
        raise InputError(
            f"model '{name}' is a config without weights (`prunekit cost`, `show` and `bench --random` take it; to run "
            "it, name the folder or hub id of a checkpoint)"
        )


def _check_weights(path: Path | str, loaded: Mapping[str, Any]) -> None:
    """Raise InputError unless the weights of a checkpoint are those that its config asks for, no fewer and no more."""
    if missing := sorted(loaded["missing_keys"]):  # transformers would go on with random numbers
        raise InputError(f"model '{path}' has no weights for {len(missing)} parameters, such as {missing[0]}")
    if unused := sorted(loaded["unexpected_keys"]):  # it would go on without them
        raise InputError(
            f"model '{path}' has {len(unused)} weights that its config has no place for, such as {unused[0]} and "
            f"{unused[-1]}; its config.json is not the one that it was saved with"
        )


def load_image_processor(name: str | Path, download: bool = False) -> Any:
    """What prepares the images of a model, on the PIL backend; called with images, it gives the model's arguments.

    What the model's processor says of images beside it, such as tiles, is filled in. Raises InputError.
    """
    import transformers

    from prunekit import upstream

    auto: Any = transformers
    path, config = resolve(name), load_config(name, download)
    with _explained(path, download):
        images = auto.AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=not download)
    for option, value in upstream.image_options(config.model_type).items():
        if hasattr(images, option):
            setattr(images, option, value)
    return images


def load_shape(name: str | Path, download: bool = False) -> ModelShape:
    """The numbers of a model from its config alone, without its weights. Raises InputError, Unsupported."""
    from prunekit.families import shape_of

    return shape_of(load_skeleton(name, download))


def load_skeleton(name: str | Path, download: bool = False) -> PreTrainedModel:
    """A model from its config alone, on the meta device: modules without weights. Raises InputError."""
    import torch
    import transformers

    auto: Any = transformers
    config = load_config(name, download)
    with _explained(resolve(name), download), torch.device("meta"):
        model: PreTrainedModel = auto.AutoModelForImageTextToText.from_config(config)
    return model


def load_config(name: str | Path, download: bool = False) -> Any:
    """The config of a model. Raises InputError."""
    import transformers

    auto: Any = transformers
    path = resolve(name)
    with _explained(path, download):
        return auto.AutoConfig.from_pretrained(path, local_files_only=not download)


def model_identity(where: Path | str) -> str | None:
    """Names the weights at `where`: 12 hex digits of a folder's files, the revision of a hub id in the local cache.

    A file of more than 256 MiB counts by its size and 64 evenly spread blocks of 1 MiB. None for a hub id that is not
    in the local cache yet.
    """
    if isinstance(where, Path):
        return _folder(where.resolve())
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(where, "config.json")
    return Path(config).parent.name[:12] if isinstance(config, str) else None


def identity_of(model: PreTrainedModel) -> str | None:
    """As `model_identity`, of the folder or hub id that a model was loaded from; None for one made in memory."""
    name = model.name_or_path or ""
    if name and Path(name).is_dir():
        return model_identity(Path(name))
    return model_identity(name) if HUB_ID.fullmatch(name) else None


@contextmanager
def _explained(path: Path | str, download: bool) -> Iterator[None]:
    """Turn what transformers raises for a missing or unsuitable model into an InputError that says what to do."""
    try:
        yield
    except PrunekitError:
        raise
    except Exception as error:  # broken folders come out of transformers as almost any exception
        reason = str(error).strip().partition("\n")[0]
        if isinstance(path, str) and isinstance(error, OSError) and not download:
            hint = "it is not in the local cache; `--download` fetches it"
        elif isinstance(error, ImportError):
            hint = "install what is missing"
        else:
            hint = "is it a complete vision-language model of transformers?"
        raise InputError(f"model '{path}' does not load: {type(error).__name__}: {reason} ({hint})") from error


def _call(name: str) -> Path:
    function = plugins.registry().get_model(name)
    try:
        return Path(function())
    except PrunekitError as error:
        raise InputError(f"model '{name}' is not available: {error}") from error
    except Exception as error:
        raise InputError(f"model '{name}' is not available: {type(error).__name__}: {error}") from error


def device_of(device: torch.device | str | None) -> torch.device:
    """A device that can be used; None: a GPU if there is one. Raises InputError."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device '{device}' cannot be used: {reason} (try 'cpu' or 'cuda')") from error
    return target


def dtype_of(dtype: torch.dtype | str) -> Any:
    """A dtype of weights, by its name. Raises InputError for one that models do not run in."""
    import torch

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}' ({did_you_mean(dtype, DTYPES)}known: {', '.join(DTYPES)})")
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@cache
def _folder(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in MATTERS and not any(part.startswith(".") for part in file.parts[-2:]):
            total.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
            for block in _blocks(file):
                total.update(block)
    return total.hexdigest()[:12]


def _blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE:
            while block := stream.read(BLOCK):
                yield block
            return
        for number in range(BLOCKS):
            stream.seek((size - BLOCK) * number // (BLOCKS - 1))
            yield stream.read(BLOCK)
