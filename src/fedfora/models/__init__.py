"""Base models: loading, quantization, fingerprints; an adapter on a base."""
