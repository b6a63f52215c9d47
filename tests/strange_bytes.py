"""What a site may send in the place of an array: numpy and zipfile raise errors of their own."""

import struct


def _npy(header):
    """A file of numpy's format with a header that a site has written."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


ALL = {
    "nothing": b"",  # EOFError
    "an archive": b"PK\x03\x04 of something",  # zipfile.BadZipFile
    "an empty archive": b"PK\x05\x06" + bytes(18),  # is no array, but read as a file
    "an announced petabyte": _npy(
        "{'descr': '<u4', 'fortran_order': False, 'shape': (10**15,)}".replace("10**15", "1" * 16)
    ),  # MemoryError
    "half a header": _npy("{'descr': '<u4',"),  # tokenize.TokenError
    "a deep header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9001) + b"-" * 9000 + b"1",
}
