"""Objects that a caption names, by a list of words, as in CHAIR.

CHAIR (Rohrbach et al. 2018, arXiv:1809.02156) counts objects that a caption names and the image
does not contain. Here an object counts as absent if no reference names it. So the score depends on
how much detail the references have. A synonym that is missing below counts against the model.
"""

import re

# Each line: the name of an object, then the words for it.
_WORDS = """
person: man woman boy girl child kid baby toddler people men women boys girls children kids babies \
lady guy person player runner rider skier surfer climber biker cyclist skateboarder swimmer \
snowboarder crowd group couple teenager adult soldier worker musician performer dancer
dog: dog puppy dogs puppies
cat: cat kitten cats
horse: horse horses pony
cow: cow cows cattle bull
sheep: sheep lamb goat goats
bird: bird birds duck ducks seagull pigeon
elephant: elephant elephants
bicycle: bicycle bike bikes bicycles
motorcycle: motorcycle motorbike motorcycles dirtbike
car: car cars van jeep taxi
bus: bus buses
truck: truck trucks
train: train trains
boat: boat boats canoe kayak raft sailboat ship
airplane: airplane plane jet
skateboard: skateboard skateboards
surfboard: surfboard surfboards
snowboard: snowboard snowboards
skis: ski skis
sled: sled sledge
ball: ball balls football baseball basketball volleyball
frisbee: frisbee frisbees
kite: kite kites
racket: racket racquet
helmet: helmet helmets
hat: hat hats cap caps
glasses: glasses sunglasses goggles
umbrella: umbrella umbrellas
backpack: backpack backpacks bag bags purse
guitar: guitar guitars
camera: camera cameras
phone: phone cellphone phones
microphone: microphone microphones
flag: flag flags
bench: bench benches
chair: chair chairs stool
table: table tables
bed: bed beds
couch: couch sofa
fountain: fountain fountains
tree: tree trees
flower: flower flowers
fence: fence fences
rope: rope ropes
stick: stick sticks
toy: toy toys doll
book: book books newspaper magazine
food: food cake pizza sandwich bread
drink: drink drinks beer wine coffee bottle cup glass
snow: snow snowy
water: water lake river ocean sea pool pond wave waves
beach: beach sand
mountain: mountain mountains cliff hill rock rocks
building: building buildings house houses
street: street road sidewalk
grass: grass grassy lawn field
"""
MASSES = ("food", "grass", "snow", "water")  # names without an article
PLURALS = ("glasses", "skis")
_GROUP_OF = re.compile(r"\b(group|couple|crowd|pair|bunch) of\b")


def _forms(word: str) -> set[str]:
    """A word and its regular plural."""
    plural = f"{word[:-1]}ies" if word.endswith("y") and word[-2:-1] not in "aeou" else f"{word}s"
    return {word, f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else plural}


OBJECT_OF = {
    form: name.strip()
    for line in _WORDS.strip().splitlines()
    for name, _, words in [line.partition(":")]
    for word in words.split()
    for form in _forms(word)
}


def named_objects(text: str) -> set[str]:
    """The objects that a text names. "a couple of dogs" names dogs only."""
    words = re.findall(r"[a-z]+", _GROUP_OF.sub(" ", text.lower()))
    return {OBJECT_OF[word] for word in words if word in OBJECT_OF}


def presence_question(name: str, wording: str = "is there {}?") -> str:
    """ "is there a dog?", "is there snow?", "are there skis?"."""
    if name in PLURALS:
        return wording.replace("is there", "are there").format(name)
    article = "" if name in MASSES else "an " if name[0] in "aeiou" else "a "
    return wording.format(article + name)
