"""Protection of what is on disk: keys of this machine, encryption, signed provenance."""
