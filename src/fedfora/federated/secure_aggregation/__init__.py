"""Secure aggregation: the coordinator learns the sum of the sites' vectors, but no single one.

The protocol is that of Bonawitz et al. 2017 (https://eprint.iacr.org/2017/281) on the sparse graph
of Bell et al. 2020 (https://eprint.iacr.org/2020/704), with keys that the sites sign. Three
exchanges a round come on top of the one that carries the update:

1. **share**: each site makes a key and a seed for this round, and hands shares of both to its
   neighbors, sealed, through the coordinator;
2. **update**: each site adds to its vector a mask from its own seed and one from each neighbor's
   key. The masks between neighbors cancel in the sum if both were told the same task and sites;
3. **confirm**: each site signs the list of sites whose vectors arrived, once;
4. **reveal**: a site that is shown enough signatures on the list that it signed sends what removes
   the other masks: shares of the own seeds of those whose vector arrived, and of the keys of those
   whose vector did not.

No single site ever helps with both for one neighbor: that would expose the neighbor's vector. What
sites do together is decided by the signatures: two lists cannot both have enough of them.

Nothing in this package knows Flower, models or rounds of training: bytes and uint32 vectors.
"""
