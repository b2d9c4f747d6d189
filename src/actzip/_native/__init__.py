"""The two extension modules: ``_codec`` (codecs, statistics of maps) and ``_engine`` (kernels, plans).

They are built from ``csrc/bindings`` and know nothing of torch; each can be imported without the
other. Only what is public elsewhere in the package is meant for users: these modules change with
it.
"""
