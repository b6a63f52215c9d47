"""Text in, token ids out: files, bundled data, prompts, partitions."""
