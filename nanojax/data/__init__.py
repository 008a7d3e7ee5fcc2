"""From text to packed batches: shards of text -> token shards -> rows; each step is a subcommand of nanojax.data."""
