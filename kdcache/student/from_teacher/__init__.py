"""A student cut out of its teacher: some of its layers, and the heads, neurons, channels and experts that matter.

    config.py      options
    layers.py      which layers a rule such as `every-2` names
    sizes.py       sizes of a model, in its configuration
    axes.py        what the sizes of each weight stand for
    cut.py         a smaller model from the weights of a larger one, and the proofs that it is right
    calibration.py rows on which it is measured what matters
    importance.py  what matters: layers by the KL, the rest by activity
    kept_states.py the same batches again and again, each time without one more layer
    kl_record.py   what was measured of layers, for a command that goes on
    make.py        all of it, into a folder

Guarantee: what is kept is kept bit for bit. A model of a class that these files do not understand is refused by the
name of its class, before anything is written: depth is proved by comparing logits with the teacher's, width by
permuting what could be dropped, which must change nothing.
"""
