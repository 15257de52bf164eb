"""Checkpoints: safetensors blocks, Hugging Face folders, receipts, model cards."""

from growformer.checkpoint.card import write_card
from growformer.checkpoint.folder import (
    companions,
    copy_companions,
    new_folder,
    read_config,
    sha256,
    size_text,
    write_config,
)
from growformer.checkpoint.receipt import RECEIPT, Receipt
from growformer.checkpoint.safetensors_io import (
    DTYPES,
    RowReader,
    TensorFiles,
    TensorInfo,
    TensorSpec,
    dtype_name,
    require_growable,
    torch_dtype,
)
from growformer.checkpoint.writer import FolderWriter, parse_size, split_shards, write_folder

__all__ = [
    "DTYPES",
    "RECEIPT",
    "FolderWriter",
    "Receipt",
    "RowReader",
    "TensorFiles",
    "TensorInfo",
    "TensorSpec",
    "companions",
    "copy_companions",
    "dtype_name",
    "new_folder",
    "parse_size",
    "read_config",
    "require_growable",
    "sha256",
    "size_text",
    "split_shards",
    "torch_dtype",
    "write_card",
    "write_config",
    "write_folder",
]
