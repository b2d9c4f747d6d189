"""``raw``: the symbols as they are, ``bits`` bits each, least significant bit first, without gaps.

The fallback that nothing can be larger than, and the measure of the others.

The three 3-bit symbols 1, 0, 6 are the bits ``100 000 011`` in the order of the stream, and its
bytes are filled from their least significant bit:

>>> import numpy as np
>>> from actzip.codec import encode, inspect
>>> blob = encode(np.array([1, 0, 6], np.uint8), codec="raw", bits=3)
>>> payload = blob[inspect(blob).header_bytes :]
>>> "".join(format(b, "08b")[::-1] for b in payload)
'1000000110000000'
"""

NAME = "raw"
