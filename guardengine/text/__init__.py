"""Text and token ids: tokenizers, chat templates, and which characters a token stands for. Knows no engine."""
