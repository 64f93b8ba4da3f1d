"""What sources of image files share: they give files' contents, and have examples from them by decoding."""

from train.data.decode import decode_bytes
from train.data.source import Encoded, Example


class EncodedSource:
    """A source whose images are files to decode. A subclass gives `encoded`, and has `__getitem__` from it."""

    augment = "inception"
    decoded = False

    def encoded(self, index: int) -> Encoded:
        """The example as it is stored. Raises BadImage where it cannot be read, DataError where more than one image is lost."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        data, label, name = self.encoded(index)
        return Example(decode_bytes(data, name), label, name)
