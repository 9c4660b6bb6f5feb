"""What a student remembers while it generates: one op state a layer, of constant size for every mixer but softmax.

transformers' own DynamicCache measures a sequence by its keys, which a recurrent state has not; so this is a `Cache` of
our own layers, which count their tokens.
"""

from torch import LongTensor, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache, CacheLayerMixin


class MixerState(CacheLayerMixin):
    """One layer's memory: `op`, the state its op returned last, and by name the `tails` of its short convolutions.

    Every tensor is [B, ...]; there is nothing before the first token.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.op = None
        self.tails: dict[str, Tensor] = {}
        self.seen = 0  # tokens of each row, padding included

    def update(self, op, tokens: int) -> None:
        """Take the state that the op returned after `tokens` more tokens."""
        self.op = op
        self.seen += tokens
        self.is_initialized = True

    def lazy_initialization(self, *args) -> None:
        """Nothing to prepare: ops start from None."""

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens seen."""
        return self.seen + query_length, 0

    def _map(self, change) -> None:
        self.op, self.tails = tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, (self.op, self.tails))

    def reset(self) -> None:
        """Forget everything."""
        self.op, self.tails, self.seen, self.is_initialized = None, {}, 0, False

    def crop(self, *args) -> None:
        """Refused: a recurrent state cannot be wound back."""
        raise NotImplementedError("a recurrent state cannot be wound back: assisted decoding needs a softmax model")

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """The state stays where it is: constant-size states are not worth offloading."""

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Row b becomes what row beam_idx[b] was (beam search)."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._map(lambda x: x[indices])


class StudentCache(Cache):
    """The memory of all layers; what a student's `generate` passes from token to token."""

    def __init__(self, layers: int):
        super().__init__(layers=[MixerState() for _ in range(layers)])

    def nbytes(self) -> int:
        """Bytes of all states: independent of the tokens seen, for every mixer but softmax."""
        return state_bytes(self)


def state_bytes(cache: Cache) -> int:
    """What the tensors of a StudentCache, or of transformers' DynamicCache, keep from being freed, in bytes.

    A view counts with all that it is a view of.
    """
    held = (x for layer in cache.layers for x in tree_leaves(vars(layer)) if isinstance(x, Tensor))
    return sum(x.untyped_storage().nbytes() for x in held)
