"""Slices of flat tensors in host memory, and how they get to the disk: safetensors, by DCP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save


class Fragment(Tensor):
    """The elements ``[start, start + len(data))`` of a flat tensor of ``numel`` elements.

    DCP takes tensors only; this one has the full size and holds no storage but the slice.
    """

    data_slice: Tensor
    start: int

    @staticmethod
    def __new__(cls, data: Tensor, start: int, numel: int) -> Fragment:
        assert data.ndim == 1 and start >= 0 and start + data.numel() <= numel
        fragment = Tensor._make_wrapper_subclass(
            cls, torch.Size([numel]), dtype=data.dtype, device=data.device
        )
        fragment.data_slice = data
        fragment.start = start
        return fragment

    def __init__(self, data: Tensor, start: int, numel: int) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without cls
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func}: a Fragment is only written and read")

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, [self.start]),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=self.__create_chunk_list__()[0],
                    properties=TensorProperties.create_from_tensor(self.data_slice),
                    size=self.size(),
                ),
            )
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(
                offsets=torch.Size([self.start]), sizes=torch.Size([self.data_slice.numel()])
            )
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.data_slice


@dataclass(frozen=True)
class Snapshot:
    """What one rank puts into a checkpoint. Nothing in it changes while training goes on.

    Attributes:
        slices: Stored name -> this rank's slice.
        file_numbers: Stored name -> number of the rank's file that holds it, for all names.
    """

    slices: dict[str, Fragment]
    file_numbers: dict[str, int]

    def write(self, folder: Path, group: ProcessGroup) -> None:
        """Write the slices into ``folder``, fsynced. Collective over ``group``, of all ranks.

        Args:
            folder: Made if missing; ranks may share it or not (their file names differ).
            group: On host memory (gloo), and used by nobody else meanwhile.

        Raises:
            CheckpointException: On all ranks, if any could not write.
        """
        writer = HuggingFaceStorageWriter(
            str(folder), fqn_to_index_mapping=self.file_numbers, save_distributed=True
        )
        state: dict[str, Any] = dict(self.slices)
        dcp_save(state, storage_writer=writer, process_group=group)


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """What ``Snapshot.write`` wrote on one rank; nothing if ZeRO gave that rank no element."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))
