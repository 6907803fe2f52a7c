"""The state of learning on the disk: one safetensors file, whole or not at all.

Parameters, the best of them, and Adam's two moments as tensors; figures, and the fingerprint of the run, as JSON in the
file's metadata. Numbers go through JSON unchanged, so a run that goes on makes the steps that it would have made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..checkpoint.atomic import whole_file
from ..errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class State:
    """The file ``path`` of the run that ``job`` (plain JSON) describes."""

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path, self.job = path, json.loads(json.dumps(job))

    def save(
        self,
        figures: Mapping[str, Any],
        best: Mapping[str, torch.Tensor],
        named: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write everything.

        Raises:
            CheckpointError: the disk is full, read-only, ...
        """
        tensors = {f"best.{name}": tensor for name, tensor in best.items()}
        for name, parameter in named.items():
            tensors[f"now.{name}"] = parameter.detach()
            tensors |= {
                f"{key}.{name}": optimizer.state[parameter][key] for key in _MOMENTS if optimizer.state[parameter]
            }
        metadata = {"job": json.dumps(self.job), "figures": json.dumps(figures)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as file:
            file.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata))

    def load(
        self, named: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Put parameters and optimizer into the state saved; its figures and best tensors. None: there is no file.

        Raises:
            CheckpointError: the file is damaged, or of another run.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if json.loads(metadata["job"]) != self.job:
                    raise CheckpointError(
                        f"{self.path} was left by a run with other options, text or model; remove it to begin anew"
                    )
                figures: dict[str, Any] = json.loads(metadata["figures"])
                best = {name: file.get_tensor(f"best.{name}").to(p.device) for name, p in named.items()}
                known = set(file.keys())
                for name, parameter in named.items():
                    parameter.data.copy_(file.get_tensor(f"now.{name}"))
                    moments = {key: file.get_tensor(f"{key}.{name}") for key in _MOMENTS if f"{key}.{name}" in known}
                    if moments:
                        optimizer.state[parameter] = {
                            key: tensor if key == "step" else tensor.to(parameter.device)
                            for key, tensor in moments.items()
                        }
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} is damaged ({error}); remove it to begin anew") from error
        return figures, best
