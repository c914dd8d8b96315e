"""Text and vectors from a model: decoding, sampling, beams, speculative decoding, chats and embeddings."""
