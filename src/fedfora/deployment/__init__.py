"""The federation on real machines: kits, processes, and what they say to each other.

The apps are those of `fedfora.federated`; this package starts processes, carries bytes, and holds
files.
"""
