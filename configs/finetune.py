# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on one's own image-text pairs: ``--config finetune:data/train.tsv --init MODEL_DIR``.

The argument is a TSV file (first line ``path<TAB>en<TAB>zh``, or fewer languages) or tars in
webdataset's layout (``'finetune:shards/*.tar'``).
"""

from ml_collections import ConfigDict

from m2jax.config import as_config_dict


def get_config(arg: str = "train.tsv") -> ConfigDict:
    """A short, careful run on the files of the argument."""
    config = as_config_dict()
    config.model.dtype = "float32"
    config.model.init = "scaled"  # of what starts afresh
    config.data.name = "tars" if arg.endswith(".tar") else "tsv"
    config.data.files = (arg,)
    config.data.languages = ("any",)  # one caption a picture, in whichever language it has
    config.data.batch_size = 64
    config.data.augment.update(scale=0.1, stretch=0.1, shift=0.05)
    config.loss.contrastive.mask_same_caption = True  # a label is no negative of itself
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 20
    config.optim.layer_decay = 0.8
    config.train.steps = 300
    config.checkpoint.every = 100
    config.eval.suite = ""
    return config
