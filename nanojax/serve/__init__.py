"""A chat server in OpenAI's form, with continuous batching, and its page."""
