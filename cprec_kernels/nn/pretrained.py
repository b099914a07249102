"""Modules as folders with ``config.json`` and ``model.safetensors``, in the manner of Hugging Face. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..partition import Partition
from .whole_file import whole_file

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "cprec-kernels"
FORMAT_VERSION = 1
FINGERPRINT_KEY = "cprec_config_sha256"


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("folders of weights need the safetensors package: pip install safetensors") from None
    return safetensors


def write_folder(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a configuration and tensors; each file appears whole or not at all, the weights first.

    A folder that exists is kept with what else is in it. :func:`read_folder` refuses a configuration and weights of
    different calls, should the process die between them.

    Raises:
        FileExistsError: ``folder`` is a file, or holds a config.json of another program.
        ImportError: the safetensors package is missing.
    """
    folder = Path(folder)
    package = _safetensors()
    if folder.exists():
        if not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: choose a folder to save to")
        if (folder / CONFIG_NAME).exists() and _config_of(folder / CONFIG_NAME).get("format") != FORMAT:
            raise FileExistsError(
                f"{folder / CONFIG_NAME} is not of {FORMAT}; it is left as it is: choose another folder"
            )
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **config}, indent=2, allow_nan=False) + "\n"
    metadata = {"format": "pt", FINGERPRINT_KEY: hashlib.sha256(text.encode()).hexdigest()}
    data = package.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)
    for name, content in ((WEIGHTS_NAME, data), (CONFIG_NAME, text.encode())):
        try:
            with whole_file(folder / name) as file:
                file.write(content)
        except BaseException:
            if made and not any(folder.iterdir()):
                folder.rmdir()
            raise
    return folder


def read_folder(
    folder: str | os.PathLike[str], device: torch.device | str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder that :func:`write_folder` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the safetensors package is missing.
        ValueError: a file is damaged, of another program or version, or the two are of different calls.
    """
    folder = Path(folder)
    package = _safetensors()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; give a folder that save_pretrained wrote")
    config = _config_of(folder / CONFIG_NAME)
    if config.get("format") != FORMAT:
        raise ValueError(f'{folder / CONFIG_NAME} is not of {FORMAT}: its "format" is {config.get("format")!r}')
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG_NAME} has format_version {config.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}: read it with the version that wrote it"
        )
    try:
        with package.safe_open(folder / WEIGHTS_NAME, framework="pt", device=str(device or "cpu")) as file:
            metadata = file.metadata() or {}
            # On the CPU they are views of the mapped file: copied, or writing to it later would write to the module.
            on_device = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            tensors = {name: tensor.clone() if tensor.device.type == "cpu" else tensor for name, tensor in on_device}
    except (package.SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} is not a whole safetensors file: {error}") from error
    fingerprint = hashlib.sha256((folder / CONFIG_NAME).read_bytes()).hexdigest()
    if metadata.get(FINGERPRINT_KEY) != fingerprint:
        raise ValueError(f"{folder / WEIGHTS_NAME} was not saved with this {CONFIG_NAME}: save the module again")
    return config, tensors


def _config_of(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return config


def refuse_parametrized(module: Any, consequence: str) -> None:
    """Raise RuntimeError if a parameter is computed from others, which parametrizations and weight_norm make of one."""
    if found := [name for name, part in module.named_modules() if parametrize.is_parametrized(part)]:
        raise RuntimeError(
            f"a parameter of {found[0] or type(module).__name__} is parametrized: {consequence}. Take that off first, "
            "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
        )


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A state_dict in which every shared tensor is there once, under its first name."""
    seen: set[int] = set()
    out = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor
    return out


def with_aliases(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`own_tensors` left out, put back for a module that shares the same tensors."""
    named = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in named.items():
        first.setdefault(id(tensor), name)
    aliases = {name: tensors[first[id(tensor)]] for name, tensor in named.items() if first[id(tensor)] in tensors}
    return {**aliases, **tensors}


class Pretrained:
    """``save_pretrained`` and ``from_pretrained`` for modules that a partition and a few options describe."""

    partition: Partition

    def _options(self) -> dict[str, Any]:
        """Plain values that the constructor takes, but for the partition and the width."""
        raise NotImplementedError

    @classmethod
    def _make(cls, partition: Partition, options: Mapping[str, Any]) -> Self:
        """A module of these options, on the meta device."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``config.json`` and ``model.safetensors`` to a folder, which is made if missing; returns the folder.

        Raises:
            FileExistsError: ``folder`` is a file, or holds a config.json of another program.
            ImportError: the safetensors package is missing.
            RuntimeError: a parameter is parametrized.
        """
        assert isinstance(self, nn.Module)
        refuse_parametrized(self, "no folder could be read back")
        config = {"module": type(self).__name__, "partition": self.partition.to_dict(), "options": self._options()}
        return write_folder(folder, config, own_tensors(self))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: torch.device | str | None = None) -> Self:
        """The module of a folder, in evaluation mode, in the dtype it was saved in; local folders only.

        Args:
            folder: as :meth:`save_pretrained` wrote it.
            device: where the parameters go; the CPU by default.

        Raises:
            FileNotFoundError: a file is missing.
            ImportError: the safetensors package is missing.
            ValueError: the folder is of another kind of module, program or version, damaged, or its tensors are not those
                that the configuration asks for.
        """
        config, tensors = read_folder(folder, device)
        if config.get("module") != cls.__name__:
            raise ValueError(f"{folder} holds a {config.get('module')}, not a {cls.__name__}")
        try:
            module: Any = cls._make(Partition.from_dict(config["partition"]), config["options"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(folder) / CONFIG_NAME}: {error}") from error
        if len({tensor.dtype for tensor in tensors.values()}) > 1:
            raise ValueError(f"{Path(folder) / WEIGHTS_NAME}: the tensors have several dtypes")
        try:
            module.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{Path(folder) / WEIGHTS_NAME} does not fit its configuration: {error}") from None
        loaded: Self = module.eval()
        return loaded
