"""A base model that is small enough to be trained and fine-tuned in minutes on two CPU cores: make chat-demo.

python -m nanojax.train --config=chat_demo
"""

from nanojax.config import Checkpoint, Compute, Config, Data, Eval, Model, Train


def get_config() -> Config:
    return Config(
        model=Model(depth=4, width=128, head_dim=32, vocab=1024, seq=256),
        compute=Compute(loss_chunk=512, residuals="all"),
        data=Data(path="data/chat_demo"),
        train=Train(steps=150, tokens_per_step=4096, microbatch=8),
        eval=Eval(every=50, tokens=1 << 14, prompt="Fellow citizens,"),
        checkpoint=Checkpoint(every=150),
    )
