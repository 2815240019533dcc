"""How questions about scenes are worded: in training, and in wordings that training never has.

The words in braces are the slots of a question (``multimodal.scenes.questions``). The first wording
of each kind is the usual one. An unseen wording has only words that occur in wordings of training:
it tests whether a model understands a question, not whether it knows a word.
"""

Wordings = dict[str, tuple[str, ...]]

TRAINING_WORDINGS: Wordings = {
    "colour": (
        "what colour {is} the {noun}?",
        "what color {is} the {noun}?",
        "which colour {is} the {noun}?",
        "what is the colour of the {noun}?",
        "tell me the colour of the {noun}.",
        "what colour {do} the {noun} have?",
    ),
    "shape": (
        "what shape is the {colour} object?",
        "which shape is the {colour} object?",
        "what is the shape of the {colour} object?",
        "which shape is {colour}?",
        "what {colour} shape can you see?",
        "name the shape of the {colour} thing.",
    ),
    "size": (
        "is the {pair} small or large?",
        "is the {pair} large or small?",
        "what size is the {pair}?",
        "what is the size of the {pair}?",
        "how large is the {pair}?",
        "tell me the size of the {pair}.",
    ),
    "texture": (
        "what texture does the {pair} have?",
        "what is the texture of the {pair}?",
        "is the {pair} solid, striped or dotted?",
        "what texture can you see on the {pair}?",
        "which texture is on the {pair}?",
        "name the texture of the {pair}.",
    ),
    "count_all": (
        "how many objects are there?",
        "how many things are there?",
        "how many shapes are in the picture?",
        "what is the number of objects?",
        "how many objects can you see?",
        "count the objects in this image.",
    ),
    "count": (
        "how many {noun} are there?",
        "how many {noun} are in the picture?",
        "what is the number of {noun}?",
        "how many {noun} can you see?",
        "count the {noun}.",
        "tell me how many {noun} this image has.",
    ),
    "exists": (
        "is there {article} {pair}?",
        "is there {article} {pair} in the picture?",
        "does the picture have {article} {pair}?",
        "can you see {article} {pair}?",
        "is {article} {pair} in this image?",
        "does this image show {article} {pair}?",
    ),
    "relation": (
        "is the {a} {relation} the {b}?",
        "can you see the {a} {relation} the {b}?",
        "does the {a} sit {relation} the {b}?",
        "in the picture, is the {a} {relation} the {b}?",
        "do you see the {a} {relation} the {b}, yes or no?",
    ),
    "neighbour": (
        "what is {relation} the {pair}?",
        "which object is {relation} the {pair}?",
        "what can you see {relation} the {pair}?",
        "what object sits {relation} the {pair}?",
        "name the object {relation} the {pair}.",
    ),
    "larger": (
        "which is {word}, the {a} or the {b}?",
        "which object is {word}, the {a} or the {b}?",
        "what is {word}, the {a} or the {b}?",
        "of the {a} and the {b}, which is {word}?",
        "the {a} or the {b}: which one is {word}?",
    ),
    "where": (
        "where is the {pair}?",
        "where in the picture is the {pair}?",
        "where can you see the {pair}?",
        "what is the position of the {pair}?",
        "tell me where the {pair} is.",
        "in what part of this image is the {pair}?",
    ),
    "background": (
        "what is the background?",
        "what background does the picture have?",
        "which background is there?",
        "what can you see in the background?",
        "tell me the background of this image.",
    ),
    "background_is": (
        "is the background {name}?",
        "is there a {name} background?",
        "does the picture have a {name} background?",
        "can you see a {name} background in this image?",
        "does this image show a {name} background?",
    ),
}

UNSEEN_WORDINGS: Wordings = {
    "colour": (
        "which color {do} the {noun} have?",
        "in what colour can you see the {noun}?",
        "name the colour of the {noun}.",
    ),
    "shape": (
        "which shape does the {colour} thing have?",
        "tell me what shape the {colour} object is.",
        "of what shape is the {colour} object?",
    ),
    "size": (
        "which size does the {pair} have?",
        "how small or large is the {pair}?",
        "can you tell me the size of the {pair}?",
    ),
    "texture": (
        "which texture can you see on the {pair}?",
        "tell me what texture the {pair} has.",
        "the {pair}: solid, dotted or striped?",
    ),
    "count_all": (
        "how many things can you see in this image?",
        "count the shapes in the picture.",
        "tell me the number of objects.",
    ),
    "count": (
        "how many {noun} does the picture have?",
        "count how many {noun} there are.",
        "can you tell me the number of {noun}?",
    ),
    "exists": (
        "do you see {article} {pair} in the picture?",
        "does the picture show {article} {pair}?",
        "in this image, is there {article} {pair}?",
    ),
    "relation": (
        "do you see the {a} {relation} the {b}?",
        "yes or no: is the {a} {relation} the {b}?",
        "tell me, does the {a} sit {relation} the {b}?",
    ),
    "neighbour": (
        "which thing is {relation} the {pair}?",
        "what do you see {relation} the {pair}?",
        "tell me what is {relation} the {pair}.",
    ),
    "larger": (
        "is the {a} or the {b} {word}?",
        "of the {a} and the {b}, what is {word}?",
        "tell me which object is {word}, the {a} or the {b}.",
    ),
    "where": (
        "where do you see the {pair}?",
        "name the position of the {pair}.",
        "in which part of the picture is the {pair}?",
    ),
    "background": (
        "which background can you see?",
        "what is in the background of the picture?",
        "name the background.",
    ),
    "background_is": (
        "do you see a {name} background?",
        "in the picture, is the background {name}?",
        "does this image have a {name} background, yes or no?",
    ),
}
