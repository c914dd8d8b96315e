"""A model makes text and vectors here: decoding, sampling, beams, speculative decoding, chats and embeddings."""
