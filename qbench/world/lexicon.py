"""The words of the bundled world: its people, things, materials, work, troubles and rules.

Nothing but data. What is true in the world follows from these tables and from the facts that
:mod:`qbench.world.facts` draws; what is written about it is :mod:`qbench.world.prose`.
"""

from __future__ import annotations

WOMEN = "Anna Bella Clara Dora Emma Fiona Greta Helen Ida Julia Kate Lucy Maria Nora Olive".split()
MEN = "Adam Boris Carl David Erik Frank Georg Hugo Ivan Jacob Karl Leo Martin Noah Oscar".split()

PLACES = ("mill", "farm", "harbour", "forest", "castle", "village", "valley", "market")
ROOMS = ("kitchen", "barn", "cellar", "attic", "garden", "shop", "tower", "stable")
TRADES = ("baker", "smith", "fisher", "weaver", "doctor", "shepherd", "painter", "teacher")
ANIMALS = ("cat", "dog", "goat", "horse", "duck", "rabbit", "crow", "donkey")
FOODS = ("bread", "soup", "cheese", "honey", "apples", "fish", "cake", "nuts")
HABITS = ("sings", "whistles", "swims", "dances", "reads", "fishes", "climbs", "draws")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")

THINGS = {
    "wood": ("spoon", "chair", "table", "ladder", "boat", "bowl", "flute"),
    "iron": ("hammer", "nail", "pot", "key", "axe", "anchor", "chain"),
    "glass": ("bottle", "window", "mirror", "vase", "lamp"),
    "clay": ("cup", "jug", "plate", "brick", "oven"),
    "wool": ("scarf", "blanket", "coat", "sock", "hat", "rug"),
    "paper": ("letter", "map", "book", "kite", "card"),
    "stone": ("statue", "bench", "tile", "marble", "step"),
    "wax": ("candle", "seal", "crayon", "doll"),
    "tin": ("bucket", "whistle", "bell", "kettle", "tray"),
    "leather": ("boot", "belt", "bag", "saddle", "glove"),
}
"""Material -> what is made of it."""

RULES = {
    "fall": ("break", "stay whole", "land softly"),
    "river": ("float", "sink", "soak up water"),
    "fire": ("burn", "melt", "glow"),
    "rain": ("rust", "become soft", "dry quickly"),
}
"""What can happen to a thing -> how it can end; which, depends on the material."""

BEHAVIOUR = {
    "wood": ("stay whole", "float", "burn", "dry quickly"),
    "iron": ("stay whole", "sink", "glow", "rust"),
    "glass": ("break", "sink", "glow", "dry quickly"),
    "clay": ("break", "sink", "glow", "become soft"),
    "wool": ("land softly", "soak up water", "burn", "become soft"),
    "paper": ("land softly", "soak up water", "burn", "become soft"),
    "stone": ("stay whole", "sink", "glow", "dry quickly"),
    "wax": ("break", "float", "melt", "dry quickly"),
    "tin": ("stay whole", "float", "melt", "rust"),
    "leather": ("land softly", "soak up water", "burn", "dry quickly"),
}
"""Material -> how it ends under each of RULES, in their order."""

HAPPENINGS = {
    "fall": ("falls on the floor", "drops the {thing} on the floor"),
    "river": ("lands in the river", "throws the {thing} into the river"),
    "fire": ("lies in the fire", "throws the {thing} into the fire"),
    "rain": ("lies in the rain", "leaves the {thing} in the rain"),
}
"""What can happen to a thing, as the thing's story and as a person's."""

NEEDS = {
    "thirsty": "drink some water",
    "hungry": "eat some bread",
    "cold": "put on a coat",
    "tired": "go to bed",
    "dirty": "wash in the river",
    "ill": "see the doctor",
    "bored": "play a game",
    "lost": "look at the map",
}
"""How somebody feels -> what helps."""

TOOLS = {
    "knife": ("cut the bread", "peel the apple", "slice the cheese"),
    "hammer": ("drive in the nail", "crack the nut", "mend the fence"),
    "bucket": ("fetch some water", "milk the goat", "empty the boat"),
    "needle": ("sew the shirt", "mend the sock", "close the sack"),
    "ladder": ("reach the roof", "climb to the attic", "pick the top apples"),
    "broom": ("sweep the floor", "chase the dust", "clean the steps"),
    "net": ("catch the fish", "catch the butterfly", "hold the balls"),
    "axe": ("chop the wood", "fell the tree", "split the log"),
    "candle": ("light the cellar", "read at night", "seal the letter"),
    "rope": ("tie the boat", "lead the donkey", "pull up the bucket"),
    "spade": ("dig a hole", "plant the tree", "turn the soil"),
    "kettle": ("boil some water", "make some tea", "warm the milk"),
    "brush": ("paint the door", "colour the wall", "scrub the horse"),
    "key": ("open the lock", "lock the shop", "enter the tower"),
    "blanket": ("keep warm at night", "cover the child", "put out the fire"),
    "saw": ("cut the plank", "shorten the table leg", "cut off the branch"),
}
"""Tool -> what it is for."""

ALSO = {
    "fell the tree": ("saw",), "chop the wood": ("saw",), "split the log": ("saw",),
    "cut the plank": ("axe", "knife"), "cut off the branch": ("axe", "knife"),
    "shorten the table leg": ("axe",), "fetch some water": ("kettle",),
    "boil some water": ("bucket",),
    "cut the bread": ("saw", "axe"), "slice the cheese": ("saw", "axe"), "crack the nut": ("axe",),
    "clean the steps": ("brush",), "chase the dust": ("brush",), "sweep the floor": ("brush",),
    "pick the top apples": ("net",), "warm the milk": ("candle", "bucket"),
    "make some tea": ("bucket",), "put out the fire": ("bucket", "kettle"),
    "dig a hole": ("axe",), "drive in the nail": ("axe",), "pull up the bucket": ("net",),
}  # fmt: skip
"""Goal -> tools that would do as well, which are no wrong answer."""

ACTIVITIES = {
    "Baking bread": ("mixes the flour with water", "kneads the dough", "lets the dough rest",
                     "puts the loaf into the oven", "takes out the hot loaf"),
    "Catching fish": ("digs up some worms", "rows out on the lake", "throws in the line",
                      "waits for a bite", "pulls up a big fish"),
    "Making cheese": ("milks the goat", "pours the milk into the pot", "stirs until it is thick",
                      "presses it through a cloth", "salts the round wheel"),
    "Shearing sheep": ("calls the flock", "holds one animal still", "clips off the fleece",
                       "ties the wool in a bundle", "lets the animal run"),
    "Painting a door": ("rubs the old paint off", "wipes the dust away", "opens the tin of colour",
                        "moves the brush up and down", "leaves the door to dry"),
    "Planting a tree": ("chooses a sunny spot", "digs a deep hole", "sets the roots in the hole",
                        "fills the hole with soil", "waters the young tree"),
    "Washing clothes": ("fills the tub with water", "rubs the shirts with soap",
                        "rinses out the foam", "wrings the shirts", "hangs them on the line"),
    "Lighting a fire": ("gathers dry sticks", "stacks the sticks in a heap", "strikes a match",
                        "blows on the small flame", "warms both hands"),
    "Brewing tea": ("fills the kettle", "sets the kettle on the stove", "drops leaves into the cup",
                    "pours the hot water", "adds a spoon of honey"),
    "Shoeing a horse": ("lifts the hoof", "pulls off the old iron", "heats the new iron",
                        "nails the new iron on", "leads the horse around"),
    "Writing a letter": ("takes a sheet of paper", "dips the pen in ink", "writes many lines",
                         "folds the sheet", "seals it with wax"),
    "Knitting a scarf": ("picks a ball of yarn", "winds the yarn on the needles",
                         "knits row after row", "cuts the last thread", "wraps it around the neck"),
    "Picking apples": ("carries a ladder to the tree", "leans the ladder on the trunk",
                       "climbs to the branches", "fills the basket with fruit",
                       "brings the basket home"),
    "Building a wall": ("marks the line with a string", "brings a load of bricks",
                        "spreads the wet mortar", "lays brick on brick", "checks that it is level"),
    "Making a pot": ("softens the clay", "puts the clay on the wheel", "shapes the sides with care",
                     "smooths the rim", "burns the pot in the kiln"),
    "Going sailing": ("unties the ropes", "pushes off from the pier", "raises the sail",
                      "steers with the wind", "returns to the pier"),
    "Cooking soup": ("peels the carrots", "chops the onions", "throws them in the broth",
                     "tastes with a ladle", "serves a full bowl"),
    "Mending a shoe": ("looks at the worn sole", "tears the worn sole off", "cuts a new sole",
                       "glues the new sole on", "polishes the leather"),
    "Keeping bees": ("puts on the veil", "smokes the hive", "opens the lid of the hive",
                     "lifts out the comb", "lets the honey drip"),
    "Chopping wood": ("sharpens the axe", "sets a log on the block", "swings the axe down",
                      "gathers the split pieces", "piles them by the house"),
}  # fmt: skip
"""What people do, step by step."""

TRAITS = {
    "strength": ("strong", "weak"),
    "speed": ("fast", "slow"),
    "wealth": ("rich", "poor"),
    "height": ("tall", "short"),
    "courage": ("brave", "timid"),
    "learning": ("clever", "simple"),
}
"""What a person is: one or the other."""

QUALITIES = {
    "size": ("large", "small"),
    "hardness": ("hard", "soft"),
    "weight": ("heavy", "light"),
    "price": ("costly", "cheap"),
}
"""What a thing is: one or the other."""

BECAUSE = (
    ("carried the bag of {b}", "strength", 0),
    ("lifted {b}", "strength", 0),
    ("asked {b} to pull", "strength", 1),
    ("overtook {b}", "speed", 0),
    ("could not catch {b}", "speed", 1),
    ("waited for {b}", "speed", 0),
    ("paid for {b}", "wealth", 0),
    ("borrowed money from {b}", "wealth", 1),
    ("gave a coat to {b}", "wealth", 0),
    ("picked the apples for {b}", "height", 0),
    ("looked up to {b}", "height", 1),
    ("hid behind {b}", "courage", 1),
    ("walked in front of {b}", "courage", 0),
    ("read the letter to {b}", "learning", 0),
    ("asked {b} for advice", "learning", 1),
    ("explained the map to {b}", "learning", 0),
)
"""What {a} did to {b}, which trait explains it, and which side of it {a} is on."""

SO = (
    ("{a} and {b} ran a race", "speed", ("came first", "came last")),
    ("{a} and {b} hurried to the boat", "speed", ("caught it", "missed it")),
    ("{a} and {b} pushed the cart", "strength", ("moved it", "gave up")),
    ("{a} and {b} carried stones all day", "strength", ("was fresh", "was tired")),
    ("{a} and {b} went to the market", "wealth", ("bought a lot", "bought nothing")),
    ("{a} and {b} chose a house", "wealth", ("took the castle", "took the hut")),
    ("{a} and {b} reached for the shelf", "height", ("touched it", "needed a chair")),
    ("{a} and {b} came to the low door", "height", ("bent down", "walked through")),
    ("{a} and {b} met a wolf", "courage", ("stood still", "ran away")),
    ("{a} and {b} heard a noise at night", "courage", ("went to look", "stayed in bed")),
    ("{a} and {b} sat an exam", "learning", ("passed", "failed")),
    ("{a} and {b} saw a riddle", "learning", ("solved it", "gave no answer")),
)
"""What happened to two people, which trait decides it, and what it makes of either side."""

BETWEEN_THINGS = (
    ("The {a} did not fit into the {b}", "size", 0),
    ("The {a} hid the {b}", "size", 0),
    ("The {a} got lost under the {b}", "size", 1),
    ("The {a} dented the {b}", "hardness", 0),
    ("The {a} was scratched by the {b}", "hardness", 1),
    ("The {a} sank below the {b}", "weight", 0),
    ("The {a} was blown over the {b}", "weight", 1),
    ("The {a} was sold before the {b}", "price", 1),
    ("The {a} was locked away before the {b}", "price", 0),
)
"""What the {a} did to the {b}, which quality explains it, and which side of it {a} is on."""

HARD = ("wood", "iron", "glass", "stone", "tin")
"""Materials of hard things; the others are soft."""

STORIES = (
    (("{n} felt thirsty.", "{s} walked to the well in the {p}.",
      ("The well was full.", "The well was dry."), "{n} let the bucket down."),
     ("{n} drank cool water.", "{n} stayed thirsty.")),
    (("{n} wanted to bake a cake.", "{s} went to the shop in the {p}.",
      ("The shop was open.", "The shop was closed."), "{n} carried a basket."),
     ("{n} came home with flour.", "{n} came home with nothing.")),
    (("{n} had a kite.", "{s} took it to the hill near the {p}.",
      ("A strong wind blew.", "There was no wind."), "{n} held the string."),
     ("The kite flew high.", "The kite stayed on the ground.")),
    (("{n} planted some seeds.", "The seeds lay in the soil of the {p}.",
      ("It rained every week.", "It never rained."), "{n} looked at the soil in summer."),
     ("Green plants had grown.", "Nothing had grown.")),
    (("{n} built a snow man.", "It stood in front of the {p}.",
      ("The night was freezing.", "The night was warm."), "{n} looked out in the morning."),
     ("The snow man still stood.", "The snow man had melted.")),
    (("{n} left home early.", "{s} wanted to catch the boat at the {p}.",
      ("{n} ran all the way.", "{n} stopped to sleep."), "The boat left at noon."),
     ("{n} sat on the boat.", "{n} missed the boat.")),
    (("{n} lost a ring.", "{s} searched in the {p}.",
      ("{n} had a bright lamp.", "It was dark and {s2} had no lamp."), "{n} looked everywhere."),
     ("{n} found the ring.", "{n} never found the ring.")),
    (("{n} had an exam.", "The school was in the {p}.",
      ("{n} had studied for weeks.", "{n} had not opened a book."), "The teacher asked questions."),
     ("{n} knew every answer.", "{n} knew no answer.")),
    (("{n} kept a goat.", "The goat stood in the {p}.",
      ("{n} had closed the gate.", "{n} had left the gate open."), "{n} came back at night."),
     ("The goat was still there.", "The goat had run away.")),
    (("{n} cooked some soup.", "The pot stood on the stove in the {p}.",
      ("{n} stirred it all the time.", "{n} forgot about it."), "After an hour {s2} tasted it."),
     ("The soup was delicious.", "The soup was burnt.")),
    (("{n} went for a long walk.", "Dark clouds hung over the {p}.",
      ("{n} had taken an umbrella.", "{n} had left the umbrella at home."), "Then it rained."),
     ("{n} came home dry.", "{n} came home wet.")),
    (("{n} wanted to cross the river.", "{s} came to the bridge near the {p}.",
      ("The bridge was strong.", "The bridge was broken."), "{n} looked at the other side."),
     ("{n} walked across.", "{n} had to turn back.")),
    (("{n} set a trap for the mouse.", "The mouse lived in the {p}.",
      ("{n} put cheese in the trap.", "{n} put a stone in the trap."), "The mouse was hungry."),
     ("The mouse was caught.", "The mouse stayed free.")),
    (("{n} wrote to a friend.", "The friend lived in the {p}.",
      ("{n} gave the letter to the postman.", "{n} forgot the letter in a drawer."),
      "A week went by."),
     ("The friend read the letter.", "The friend heard nothing.")),
)  # fmt: skip
"""Four sentences, of which the third has two forms, and the ending each form leads to."""
