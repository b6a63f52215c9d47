"""Real sites: files, keys and processes of a federation on several machines.

What a federation computes is in `fedfora.federated`; nothing here changes it.
"""
