"""The cache of a student during generation: one op state per layer, of constant size for every mixer but softmax.

transformers' DynamicCache takes the number of tokens from the shape of its keys; a recurrent state has none, so the layers of
this cache count tokens.
"""

from dataclasses import fields

from torch import LongTensor, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

# what models, their layers and their outputs call a cache: `cache` from transformers 5.24 on
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class MixerState(CacheLayerMixin):
    """The state of one layer: `op`, the last state that its op returned, and `tails`, the last inputs of its convolutions.

    `op` is None before the first token; `tails` is a dict by name. Every tensor in them is [B, ...].
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.op = None
        self.tails: dict[str, Tensor] = {}
        self.seen = 0

    def update(self, op, tokens: int) -> None:
        """Replace the op's state by `op`, the state after `tokens` more tokens in each row (padding included)."""
        self.op = op
        self.seen += tokens
        self.is_initialized = True

    def lazy_initialization(self, *args) -> None:
        """Do nothing: an op allocates its state when it is called with None."""

    def get_seq_length(self) -> int:
        """Return the number of tokens seen in each row, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1, transformers' value for a cache without a maximum length."""
        return -1

    get_max_cache_shape = get_max_length  # the name that transformers 5.17 calls

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of an attention mask over the tokens seen and `query_length` new ones."""
        return self.seen + query_length, 0

    def _map(self, change) -> None:
        self.op, self.tails = tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, (self.op, self.tails))

    def reset(self) -> None:
        """Return to the state before the first token."""
        self.op, self.tails, self.seen, self.is_initialized = None, {}, 0, False

    def crop(self, *args) -> None:
        """Raise NotImplementedError: a recurrent state cannot be rolled back."""
        raise NotImplementedError("a recurrent state cannot be cropped: assisted decoding needs a softmax model")

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Replace row b by row beam_idx[b], as beam search asks. beam_idx [B]."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies next to each other."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`."""
        self._map(lambda x: x[indices])


class StudentCache(Cache):
    """The cache of all layers of a student, which `generate` passes from token to token."""

    def __init__(self, layers: int):
        super().__init__(layers=[MixerState() for _ in range(layers)])

    def rows(self) -> int | None:
        """Return the number of sequences in the cache, None before the first token."""
        first = self.layers[0]
        return next((len(x) for x in tree_leaves((first.op, first.tails)) if isinstance(x, Tensor)), None)


def state_bytes(cache: Cache) -> int:
    """Return the bytes of memory that the tensors of a StudentCache or a transformers DynamicCache keep allocated.

    A view counts with the whole storage behind it, which it keeps from being freed.
    """
    tensors = (x for layer in cache.layers for x in tree_leaves(vars(layer)) if isinstance(x, Tensor))
    return sum(x.untyped_storage().nbytes() for x in tensors)
