"""First drafts of family literals, read off tiny random models of transformers' own classes."""

from growformer.drafts.draft import Draft, infer
from growformer.drafts.settled import sized_by
from growformer.drafts.shrink import shrink
from growformer.drafts.write import source_of

__all__ = ["Draft", "infer", "shrink", "sized_by", "source_of"]
