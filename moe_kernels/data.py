"""Text as bytes: any folder, or the Python standard library's own sources; blocks of it in a shuffled order."""

import math
import sysconfig
import zlib
from pathlib import Path

import torch

from .errors import UserError

_VALIDATION_EVERY = 20  # one file of 20 is held out
_MAX_FILE_BYTES = 16 * 2**20
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", ".git"}


def load_text(path=None):
    """Reads a folder (or a single file) of text.

    Files that hold a zero byte or are no UTF-8 count as binary and are left out. Of 20 files, in the order of their
    names, one is held out for validation; of a single file, its last twentieth.
    Args: path: a folder, a file, or None for the Python standard library's *.py files.
    Returns: (training, validation), both [n] uint8.
    Raises: UserError when there is nothing to read.
    """
    root = Path(sysconfig.get_path("stdlib") if path is None else path)
    if not root.exists():
        raise UserError(f"no such file or folder: {root}")
    files = [root] if root.is_file() else _files(root, "*.py" if path is None else "*")
    texts = [text for text in map(_read, files) if text]
    if not texts:
        raise UserError(f"no text in {root}: {len(files)} files, none of them text")
    if len(texts) < _VALIDATION_EVERY:
        joined = b"\n".join(texts)
        cut = len(joined) - len(joined) // _VALIDATION_EVERY
        return _tensor(joined[:cut]), _tensor(joined[cut:])
    held_out = texts[_VALIDATION_EVERY // 2::_VALIDATION_EVERY]
    rest = [text for i, text in enumerate(texts) if i % _VALIDATION_EVERY != _VALIDATION_EVERY // 2]
    return _tensor(b"\n".join(rest)), _tensor(b"\n".join(held_out))


def byte_entropy(data):
    """Bits a byte that a code needs which knows nothing but how often each byte comes."""
    share = torch.bincount(data.long(), minlength=256).double() / max(data.numel(), 1)
    return -sum(p * math.log2(p) for p in share.tolist() if p > 0)


class Blocks:
    """Blocks of `length` + 1 bytes in an order shuffled anew each epoch; consecutive blocks share a byte.

    Its place is three numbers (`state`, `load_state`), and a resumed run gets the very batches that were to come.
    Raises: UserError when the text has not one block.
    """

    def __init__(self, data, length, seed=0):
        self.data, self.length, self.seed = data, length, seed
        self.num_blocks = (data.numel() - 1) // length
        if self.num_blocks < 1:
            raise UserError(f"the text has {data.numel()} bytes, one block needs {length + 1}")
        self.epoch, self.cursor = 0, 0
        self._order = self._shuffle()

    def batch(self, size):
        """The next `size` blocks, [size, length + 1] int64."""
        chosen = []
        while len(chosen) < size:
            if self.cursor == self.num_blocks:
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._shuffle()
            chosen.append(self._order[self.cursor])
            self.cursor += 1
        return torch.stack([self._block(index) for index in chosen])

    def spread(self, count):
        """`count` blocks evenly over the whole text, or all there are, [n, length + 1] int64: for validation."""
        count = min(count, self.num_blocks)
        return torch.stack([self._block(index * self.num_blocks // count) for index in range(count)])

    def state(self):
        return {"seed": self.seed, "epoch": self.epoch, "cursor": self.cursor, "num_bytes": self.data.numel(),
                "crc32": zlib.crc32(self.data.numpy())}

    def load_state(self, state):
        """Raises: UserError when the state is of another text."""
        own = self.state()
        if state["num_bytes"] != self.data.numel():
            raise UserError(f"the checkpoint was trained on {state['num_bytes']} bytes of text, "
                            f"this text has {self.data.numel()}: resume with the same --data")
        if state.get("crc32", own["crc32"]) != own["crc32"]:
            raise UserError("the checkpoint was trained on another text of this length: resume with the same --data")
        self.seed, self.epoch, self.cursor = state["seed"], state["epoch"], state["cursor"]
        self._order = self._shuffle()

    def _block(self, index):
        return self.data[index * self.length:(index + 1) * self.length + 1].long()

    def _shuffle(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.num_blocks, generator=generator).tolist()


def _files(root, pattern):
    paths = (path for path in root.rglob(pattern) if path.is_file())
    return sorted(path for path in paths if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts))


def _read(path):
    """The file's bytes, or b"" if it is binary, unreadable or larger than a text is."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return b""
        content = path.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return b"" if b"\0" in content else content


def _tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
