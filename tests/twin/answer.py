"""Inside the twin: answer from a SavedModel as TensorFlow Serving does, through the V1 session loader.

answer.py MODEL SIGNATURE IN.npz OUT.npz
IN.npz has one array an input of the signature. For `serving_default`, which takes one query, `input_1` may
be (n, dim): each row is a request. OUT.npz gets one array an output, stacked over the requests.
"""

import sys

import numpy as np
import tensorflow.compat.v1 as tf
from scann.scann_ops.py import scann_ops  # noqa: F401  registers ScaNN's ops


def answer(session, signature, arrays):
    """The signature's outputs by name for one request."""
    feed = {signature.inputs[name].name: array for name, array in arrays.items()}
    fetch = {name: output.name for name, output in signature.outputs.items()}
    return session.run(fetch, feed)


def main(model, signature_name, given, wanted):
    with tf.Session(graph=tf.Graph()) as session:
        loaded = tf.saved_model.load(session, [tf.saved_model.tag_constants.SERVING], model)
        signature = loaded.signature_def[signature_name]
        arrays = dict(np.load(given, allow_pickle=False))
        if signature_name == "serving_default" and arrays["input_1"].ndim == 2:
            answers = [answer(session, signature, {"input_1": row}) for row in arrays["input_1"]]
            outputs = {name: np.stack([a[name] for a in answers]) for name in answers[0]}
        else:
            outputs = answer(session, signature, arrays)
    as_text = np.vectorize(lambda value: value.decode("utf-8"), otypes=[str])
    outputs = {n: as_text(o) if o.dtype == object else o for n, o in outputs.items()}
    np.savez(wanted, **outputs)
    print("answered by TensorFlow", tf.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
