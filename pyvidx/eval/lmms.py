"""pyvidx's memories in lmms-eval (0.7): any host x policy x budget on its video tasks, and two controls.

    python -m lmms_eval --model pyvidx --tasks videomme,mlvu --batch_size 1 \\
        --model_args pretrained=FOLDER,policy=merge,capacity=16,frames=64
    ... --model_args pretrained=FOLDER,policy=uniform,capacity=16              # as many frames without a memory
    ... --model_args pretrained=FOLDER,policy=random,capacity=16,frames=64,seed=1
    ... --model_args pretrained=FOLDER,policy=dtd,capacity=None,threshold=0.4,frames=64    # a policy of no fixed budget

lmms-eval finds it by the entry point "pyvidx" of the group lmms_eval.models. The model is in pyvidx.eval.lmms_model,
which it imports when it is asked for.
"""


def manifest():
    """What lmms-eval is told of the model.

    Raises:
        ImportError: lmms-eval is not installed; it alone asks.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pyvidx", simple_class_path="pyvidx.eval.lmms_model.Pyvidx")
