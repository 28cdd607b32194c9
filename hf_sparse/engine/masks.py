"""Masks: which weights are kept, and the only code that enforces zeros in the parameters of a model.

A mask is stored as int8, -1 (all bits set) where a weight is kept and 0 where it is pruned. A bitwise AND of the
weight's bits with the sign-extended mask leaves kept weights unchanged, bit for bit, and sets pruned ones to +0.0,
whatever they held; a multiplication would leave -0.0 and keep nan. It is also the fastest exact way: one read of the
weights and of one byte per weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ..kernels import has_kernels
from ..numerics import BITS, count_true, gather_counts


# On a CPU the mask is widened to the weight's dtype in a temporary, which this many elements keep small.
_CHUNK = 1 << 20


class MaskStore(Mapping[str, torch.Tensor]):
    """A mapping of parameter names to masks (bool, True is kept). Initially everything is kept.

    A mask has the shape of the parameter, or of the part of it that this rank holds.

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
        """Returns the mask of `name` as int8, -1 where kept and 0 where pruned. It is not a copy."""
        return self._bits[name]

    def replace(self, name: str, mask: torch.Tensor) -> None:
        """Sets the mask of `name` (bool, True is kept).

        Raises:
            ValueError: the mask is not bool or not of the parameter's shape.
        """
        bits = self._bits[name]
        if mask.shape != bits.shape or mask.dtype != torch.bool:
            raise ValueError(
                f'mask of "{name}": {mask.dtype} of shape {tuple(mask.shape)} instead of torch.bool of '
                f"{tuple(bits.shape)}."
            )
        bits.copy_(mask).neg_()

    def open(self, name: str) -> None:
        """Keeps all weights of `name`."""
        self._bits[name].fill_(-1)

    def kept(self, name: str) -> int:
        """Returns the number of kept weights of `name`."""
        return int(torch.count_nonzero(self._bits[name]))

    def pruned(self, name: str) -> int:
        """Returns the number of pruned weights of `name`."""
        return self._bits[name].numel() - self.kept(name)

    @torch.no_grad()
    def enforce(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Sets pruned weights to +0.0 in place. Kept weights and parameters without a mask do not change."""
        together: list[tuple[torch.Tensor, torch.Tensor]] = []
        names = parameters.keys() & self._bits.keys()
        kernel_devices = {device for device in {parameters[name].device for name in names} if has_kernels(device)}
        for name in names:
            weight = parameters[name]
            if not weight.is_contiguous():
                weight.detach().masked_fill_(self._bits[name].to(weight.device) == 0, 0)
            elif weight.device in kernel_devices:
                together.append((weight, self._bits[name].to(weight.device)))
            else:
                for part, bits in self._parts(name, weight.detach()):
                    part.bitwise_and_(bits)
        if together:
            from ..kernels.masks import enforce_masks

            enforce_masks(together)

    @torch.no_grad()
    def num_revived(self, name: str, weight: torch.Tensor) -> int:
        """Returns the number of pruned weights of `name` that are not +0.0.

        Example:
            >>> masks = MaskStore({"w": (torch.Size([3]), torch.device("cpu"))})
            >>> masks.replace("w", torch.tensor([True, False, False]))
            >>> masks.num_revived("w", torch.tensor([1.0, 0.0, float("nan")]))
            1
        """
        counts = [count_true((part & ~bits) != 0) for part, bits in self._parts(name, weight.detach().contiguous())]
        return int(gather_counts(counts).sum())

    def _parts(self, name: str, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the bits of a contiguous weight as integers and those of its mask: on a CPU in chunks."""
        words, bits = weight.view(BITS[weight.dtype]).view(-1), self._bits[name].to(weight.device).view(-1)
        size = max(words.numel(), 1) if weight.is_cuda else _CHUNK
        return zip(words.split(size), bits.split(size), strict=True)

    def packed(self, name: str) -> torch.Tensor:
        """Returns the mask as uint8, eight weights per byte, the first in the highest bit."""
        return torch.from_numpy(np.packbits(self._bits[name].cpu().numpy() != 0))

    def digest_of(self, name: str) -> int:
        """Returns a 64-bit digest of the name, the shape and the values of one mask."""
        bits = self._bits[name]
        digest = hashlib.blake2b(f"{name}{tuple(bits.shape)}".encode(), digest_size=8)
        digest.update(self.packed(name).numpy().tobytes())
        return int.from_bytes(digest.digest(), "little", signed=True)

    def digest(self) -> str:
        """Returns a digest of all masks, independent of their order."""
        numbers = sorted(self.digest_of(name) for name in self._bits)
        return hashlib.blake2b(str(numbers).encode(), digest_size=16).hexdigest()


def zero_counts(tensors: Sequence[torch.Tensor | None]) -> np.ndarray:
    """Returns the number of zeros (-0.0 too) of each tensor, int64, and 0 for None; waits for a device once.

    Example:
        >>> zero_counts([torch.tensor([0.0, 2.0]), None, torch.tensor([0, -1, 0], dtype=torch.int8)])
        array([1, 0, 2])
    """
    given = [tensor.detach() for tensor in tensors if tensor is not None]
    if given and len({tensor.device for tensor in given}) == 1 and has_kernels(given[0].device):
        from ..kernels.masks import count_zeros_of

        counts = iter(count_zeros_of([tensor.contiguous() for tensor in given]).tolist())
        return np.array([0 if tensor is None else next(counts) for tensor in tensors], dtype=np.int64)
    return gather_counts([0 if tensor is None else count_true(tensor.detach() == 0) for tensor in tensors])


def unpack_mask(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Returns a packed mask as bool, of shape (numel,).

    Raises:
        ValueError: the packed mask is not of `numel` weights.

    Example:
        >>> unpack_mask(torch.tensor([0b10100000], dtype=torch.uint8), 3)
        tensor([ True, False,  True])
    """
    needed = -(-numel // 8)
    if packed.dtype != torch.uint8 or packed.shape != (needed,):
        raise ValueError(
            f"a mask is {packed.dtype} of shape {tuple(packed.shape)}; for {numel} weights it must be torch.uint8 of "
            f"({needed},)."
        )
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=numel).view(np.bool_))
