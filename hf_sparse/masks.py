"""Masks: which weights are kept, and the only code that writes zeros.

A mask is held as int8, -1 (all bits set) where a weight is kept and 0 where it is pruned. A bitwise AND of the
weight's own bits with the sign-extended mask then leaves kept weights as they are, bit for bit, and makes pruned ones
+0.0, whatever they held: multiplying would leave -0.0 and keep a nan. It is also the fastest of the exact ways:
one read of the weights and of one byte per weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch


# The same-sized integer of each floating dtype.
_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
# On a CPU the mask is widened to the weight's size in a temporary; at this many elements that stays small.
_CHUNK = 1 << 20


class MaskStore(Mapping[str, torch.Tensor]):
    """Parameter name -> mask (bool, True is kept, of the parameter's shape). Everything is kept at first.

    Args:
        shapes: parameter name -> (shape, device).

    Example:
        >>> weight = torch.tensor([[-1.0, 2.0], [3.0, float("nan")]])
        >>> masks = MaskStore({"w": (weight.shape, weight.device)})
        >>> masks.replace("w", torch.tensor([[False, True], [True, False]]))
        >>> masks.enforce({"w": weight})
        >>> weight
        tensor([[0., 2.],
                [3., 0.]])
        >>> masks.pruned("w")
        2
    """

    def __init__(self, shapes: Mapping[str, tuple[torch.Size, torch.device]]):
        self._bits = {
            name: torch.full(tuple(shape), -1, dtype=torch.int8, device=device)
            for name, (shape, device) in shapes.items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._bits[name] != 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def bits(self, name: str) -> torch.Tensor:
        """The mask itself, int8: -1 where kept, 0 where pruned. Writing to it changes the mask."""
        return self._bits[name]

    def replace(self, name: str, mask: torch.Tensor) -> None:
        """Set the mask of `name` (bool, True is kept).

        Raises:
            ValueError: another shape or dtype than the parameter's mask.
        """
        bits = self._bits[name]
        if mask.shape != bits.shape or mask.dtype != torch.bool:
            raise ValueError(
                f'mask of "{name}": {mask.dtype} of shape {tuple(mask.shape)} instead of torch.bool of '
                f"{tuple(bits.shape)}."
            )
        bits.copy_(mask).neg_()

    def kept(self, name: str) -> int:
        """How many weights of `name` are kept."""
        return int(torch.count_nonzero(self._bits[name]))

    def pruned(self, name: str) -> int:
        """How many weights of `name` are pruned."""
        return self._bits[name].numel() - self.kept(name)

    @torch.no_grad()
    def enforce(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Write +0.0 wherever a weight is pruned; kept weights are not touched, bit for bit."""
        for name, bits in self._bits.items():
            weight = parameters[name].detach()
            if not weight.is_contiguous():
                weight.masked_fill_(bits == 0, 0)
                continue
            weight, bits = weight.view(_BITS[weight.dtype]).view(-1), bits.view(-1)
            if weight.is_cuda or weight.numel() <= _CHUNK:
                weight.bitwise_and_(bits)
                continue
            for part, part_bits in zip(weight.split(_CHUNK), bits.split(_CHUNK), strict=True):
                part.bitwise_and_(part_bits)

    def packed(self) -> dict[str, torch.Tensor]:
        """Name -> the mask as uint8, eight weights to the byte, first weight in the highest bit."""
        return {name: torch.from_numpy(np.packbits(bits.cpu().numpy() != 0)) for name, bits in self._bits.items()}

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `packed`.

        Raises:
            ValueError: a mask is missing, is of no parameter here, or is too long or too short.
        """
        missing, foreign = sorted(self._bits.keys() - packed.keys()), sorted(packed.keys() - self._bits.keys())
        if missing or foreign:
            raise ValueError(
                f"masks do not fit the model: missing {missing[:3]}, of no selected weight {foreign[:3]}."
            )
        for name, bits in self._bits.items():
            bytes_needed = -(-bits.numel() // 8)
            if packed[name].dtype != torch.uint8 or packed[name].shape != (bytes_needed,):
                raise ValueError(
                    f'mask of "{name}" is {packed[name].dtype} of shape {tuple(packed[name].shape)}; '
                    f"for a weight of shape {tuple(bits.shape)} it must be torch.uint8 of ({bytes_needed},)."
                )
        for name, bits in self._bits.items():
            flat = np.unpackbits(packed[name].numpy(), count=bits.numel())
            bits.copy_(torch.from_numpy(flat.view(np.int8)).view(bits.shape)).neg_()

    def digest(self) -> str:
        """SHA-256 over names, shapes and masks: equal on every rank, and in a checkpoint that is not damaged."""
        return digest_of(self.packed(), {name: tuple(bits.shape) for name, bits in self._bits.items()})


def digest_of(packed: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The digest of masks in packed form."""
    digest = hashlib.sha256()
    for name in sorted(packed):
        digest.update(f"{name}{tuple(shapes[name])}".encode())
        digest.update(packed[name].numpy().tobytes())
    return digest.hexdigest()
