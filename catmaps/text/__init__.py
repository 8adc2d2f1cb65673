"""Text in and out: tokenizers, corpora and token shards. Knows nothing of flows or networks."""
