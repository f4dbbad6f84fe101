"""What everyone knows, as tables from phrases to conclusions, for the template teacher.

Every table is keyed by words a description may contain, whatever wrote the description. Nothing
here knows about pictures, regions or sources.
"""

# ---- people, told by what they wear: phrase -> who that is ----

HEADWEAR = {
  "tall white hat": "chef",
  "blue cap": "police officer",
  "red helmet": "firefighter",
  "orange helmet": "builder",
  "pointed purple hat": "wizard",
  "gold crown": "king",
  "brown wide hat": "cowboy",
  "green feathered hat": "archer",
}

# ---- what people do with their bodies: word -> (feeling, what it does to another) ----

POSES = {
  "standing": ("calm", "waits for"),
  "waving": ("friendly", "greets"),
  "cheering": ("happy", "cheers for"),
  "running": ("hurried", "runs to"),
  "sitting": ("tired", "rests near"),
}

# ---- surroundings: word in a caption -> (value, how a rationale says it) ----

WEATHER = {"sunny": "in the sun", "rainy": "in the rain", "snowy": "in the snow"}
WEATHER_WORDS = {
  "sunny": "sunny",
  "sunshine": "sunny",
  "rainy": "rainy",
  "raining": "rainy",
  "rain": "rainy",
  "snowy": "snowy",
  "snowing": "snowy",
  "snow": "snowy",
}
PLACES = {
  "beach": "at the beach",
  "forest": "in the forest",
  "city": "in the city",
  "desert": "in the desert",
  "farm": "at the farm",
  "castle": "at the castle",
}
PLACE_WORDS = {place: place for place in PLACES} | {
  "woods": "forest",
  "seaside": "beach",
  "street": "city",
}

# ---- why someone holds a thing, and what happens next ----
# A plain text holds everywhere; a dict maps settings (weather for WHY, place for NEXT) to texts,
# and "" is the text for every setting that is not listed.

WHY = {
  "umbrella": {"sunny": "to make some shade", "rainy": "to stay dry", "snowy": "to block the snow"},
  "ball": "to play a game",
  "book": "to read a story",
  "balloon": "to join a party",
  "phone": "to call a friend",
  "cup": {"sunny": "to have a cold drink", "": "to have a warm drink"},
  "flower": "to bring a present",
  "sword": "to fight a dragon",
  "fish": "to cook a meal",
  "broom": {"snowy": "to clear the snow", "": "to clean the ground"},
}
NEXT = {
  "umbrella": "close the umbrella",
  "ball": {"city": "bounce the ball", "": "kick the ball"},
  "book": "turn the page",
  "balloon": "let the balloon fly",
  "phone": "send a message",
  "cup": "take a sip",
  "flower": {"farm": "plant the flower", "forest": "plant the flower", "": "smell the flower"},
  "sword": {"castle": "guard the gate", "": "swing the sword"},
  "fish": {"beach": "let the fish swim", "": "fry the fish"},
  "broom": {
    "forest": "sweep the leaves",
    "desert": "sweep the sand",
    "beach": "sweep the sand",
    "": "sweep the floor",
  },
}

# ---- the 80 classes of COCO and what else detectors name ----
# name: (what it is for or what it does, what may happen next). A person beside one of them: BESIDE.

OBJECTS = {
  "bicycle": ("to ride around", "it rolls down the road"),
  "car": ("to drive to places", "it drives away"),
  "motorcycle": ("to ride fast", "it speeds down the road"),
  "airplane": ("to fly people far away", "it takes off or lands"),
  "bus": ("to carry passengers", "it stops to let people in"),
  "train": ("to carry passengers on rails", "it leaves the station"),
  "truck": ("to carry heavy goods", "it delivers its load"),
  "boat": ("to cross the water", "it sails on"),
  "traffic light": ("to tell cars when to go", "it changes its colour"),
  "fire hydrant": ("to give water to firefighters", "it stays ready for a fire"),
  "stop sign": ("to make cars stop", "a car stops in front of it"),
  "parking meter": ("to pay for parking", "someone puts in a coin"),
  "bench": ("to sit down and rest", "someone sits down on it"),
  "bird": ("to sing in the morning", "it flies away"),
  "cat": ("to keep people company", "it takes a nap"),
  "dog": ("to keep people company", "it wags its tail"),
  "horse": ("to carry a rider", "it trots along"),
  "sheep": ("to give wool", "it eats some grass"),
  "cow": ("to give milk", "it eats some grass"),
  "elephant": ("to amaze visitors", "it lifts its trunk"),
  "bear": ("to roam the woods", "it looks for food"),
  "zebra": ("to roam the savanna", "it trots to its herd"),
  "giraffe": ("to eat leaves from tall trees", "it stretches for the leaves"),
  "backpack": ("to carry things on the back", "someone opens it"),
  "umbrella": ("to stay dry in the rain", "someone folds it"),
  "handbag": ("to carry small things", "someone takes out a purse"),
  "tie": ("to dress for work", "someone loosens it"),
  "suitcase": ("to pack for a trip", "someone carries it away"),
  "frisbee": ("to throw to a friend", "someone catches it"),
  "skis": ("to slide over snow", "they slide down the hill"),
  "snowboard": ("to ride down the snow", "it slides down the hill"),
  "sports ball": ("to play a game", "someone hits or kicks it"),
  "kite": ("to play with the wind", "it climbs higher"),
  "baseball bat": ("to hit the ball", "someone swings it"),
  "baseball glove": ("to catch the ball", "it catches the ball"),
  "skateboard": ("to ride and do tricks", "it rolls away"),
  "surfboard": ("to ride the waves", "it glides over a wave"),
  "tennis racket": ("to hit the ball", "someone swings it"),
  "bottle": ("to hold a drink", "someone opens it"),
  "wine glass": ("to drink wine", "someone raises it for a toast"),
  "cup": ("to drink something", "someone takes a sip"),
  "fork": ("to pick up food", "someone takes a bite"),
  "knife": ("to cut food", "someone cuts something"),
  "spoon": ("to eat soup", "someone stirs with it"),
  "bowl": ("to hold food", "someone fills it"),
  "banana": ("to eat as a snack", "someone peels it"),
  "apple": ("to eat as a snack", "someone bites into it"),
  "sandwich": ("to eat for lunch", "someone eats it"),
  "orange": ("to eat as a snack", "someone peels it"),
  "broccoli": ("to eat something healthy", "someone eats it"),
  "carrot": ("to eat something healthy", "someone eats it"),
  "hot dog": ("to eat for lunch", "someone adds mustard"),
  "pizza": ("to share a meal", "someone takes a slice"),
  "donut": ("to eat something sweet", "someone takes a bite"),
  "cake": ("to celebrate", "someone cuts it"),
  "chair": ("to sit on", "someone sits down on it"),
  "couch": ("to rest in comfort", "someone sits down on it"),
  "potted plant": ("to make a room green", "someone waters it"),
  "bed": ("to sleep in", "someone lies down on it"),
  "dining table": ("to eat at", "people sit down to eat"),
  "toilet": ("to use in the bathroom", "someone flushes it"),
  "tv": ("to watch shows", "someone turns it on"),
  "laptop": ("to work or write", "someone types on it"),
  "mouse": ("to move the pointer", "someone clicks it"),
  "remote": ("to change the channel", "someone presses a button"),
  "keyboard": ("to type", "someone types on it"),
  "cell phone": ("to call someone", "it rings"),
  "microwave": ("to heat food", "it beeps when the food is hot"),
  "oven": ("to bake food", "someone takes out a hot dish"),
  "toaster": ("to toast bread", "the toast pops up"),
  "sink": ("to wash things", "someone turns on the water"),
  "refrigerator": ("to keep food cold", "someone opens the door"),
  "book": ("to read", "someone turns a page"),
  "clock": ("to tell the time", "its hands move on"),
  "vase": ("to hold flowers", "someone puts flowers in it"),
  "scissors": ("to cut paper", "someone cuts something"),
  "teddy bear": ("to cuddle", "a child hugs it"),
  "hair drier": ("to dry hair", "someone turns it on"),
  "toothbrush": ("to clean teeth", "someone brushes their teeth"),
}

# Animals feel; things do not.
ANIMAL_FEELINGS = {
  "bird": "alert",
  "cat": "relaxed",
  "dog": "playful",
  "horse": "calm",
  "sheep": "peaceful",
  "cow": "peaceful",
  "elephant": "calm",
  "bear": "hungry",
  "zebra": "watchful",
  "giraffe": "curious",
}

# A person beside one of these: (who that is or "", why, what the person does next, feeling, what
# the person does with it).
BESIDE = {
  "bicycle": ("a cyclist", "to ride somewhere", "ride on", "free", "rides"),
  "car": ("a driver", "to drive somewhere", "drive away", "ready to go", "drives"),
  "motorcycle": ("a biker", "to ride fast", "speed away", "bold", "rides"),
  "airplane": ("a passenger", "to fly somewhere", "get on board", "ready to travel", "boards"),
  "bus": ("a passenger", "to get to town", "get on board", "patient", "takes"),
  "train": ("a passenger", "to travel", "get on board", "patient", "takes"),
  "truck": ("a driver", "to deliver something", "unload the goods", "busy", "drives"),
  "boat": ("a sailor", "to go out on the water", "row or sail on", "calm", "sails"),
  "bench": ("", "to rest for a while", "sit down", "tired", "rests on"),
  "dog": ("a dog owner", "to take a walk", "walk the dog", "cheerful", "looks after"),
  "cat": ("a cat owner", "to have company", "stroke the cat", "relaxed", "looks after"),
  "horse": ("a rider", "to ride", "ride on", "proud", "rides"),
  "sheep": ("a shepherd", "to watch the herd", "lead the herd home", "patient", "looks after"),
  "cow": ("a farmer", "to get milk", "feed the cow", "busy", "looks after"),
  "elephant": ("a visitor", "to see it up close", "take a photo", "amazed", "watches"),
  "backpack": ("a hiker", "to carry things along", "walk on", "ready to go", "carries"),
  "umbrella": ("", "to stay dry", "walk on under it", "sheltered", "holds"),
  "suitcase": ("a traveller", "to go on a trip", "leave for a trip", "ready to travel", "carries"),
  "tie": ("an office worker", "to look smart", "go to a meeting", "serious", "wears"),
  "frisbee": ("", "to play catch", "throw it", "playful", "throws"),
  "skis": ("a skier", "to slide over the snow", "ski down the hill", "excited", "stands on"),
  "snowboard": ("a snowboarder", "to ride down the snow", "ride down the hill", "excited", "rides"),
  "sports ball": ("a player", "to win the game", "hit or kick it", "focused", "plays with"),
  "kite": ("", "to play with the wind", "let it climb higher", "playful", "flies"),
  "baseball bat": ("a batter", "to hit the ball", "swing at the ball", "focused", "swings"),
  "baseball glove": (
    "a baseball player",
    "to catch the ball",
    "catch the ball",
    "focused",
    "wears",
  ),
  "skateboard": ("a skateboarder", "to do a trick", "do a trick", "bold", "rides"),
  "surfboard": ("a surfer", "to ride the waves", "ride a wave", "excited", "rides"),
  "tennis racket": ("a tennis player", "to hit the ball", "hit the ball back", "focused", "swings"),
  "wine glass": ("a guest", "to enjoy a drink", "raise the glass", "cheerful", "drinks from"),
  "cup": ("", "to have a drink", "take a sip", "relaxed", "drinks from"),
  "pizza": ("", "to have a meal", "take a slice", "hungry", "eats"),
  "sandwich": ("", "to have lunch", "take a bite", "hungry", "eats"),
  "hot dog": ("", "to have lunch", "take a bite", "hungry", "eats"),
  "donut": ("", "to eat something sweet", "take a bite", "hungry", "eats"),
  "cake": ("", "to celebrate", "cut the cake", "happy", "celebrates with"),
  "couch": ("", "to rest in comfort", "lean back", "relaxed", "rests on"),
  "bed": ("", "to get some sleep", "lie down", "sleepy", "rests on"),
  "dining table": ("", "to have a meal", "start to eat", "hungry", "sits at"),
  "laptop": ("an office worker", "to get work done", "type something", "focused", "works on"),
  "tv": ("", "to watch a show", "pick a show", "relaxed", "watches"),
  "remote": ("", "to change the channel", "press a button", "relaxed", "uses"),
  "cell phone": ("", "to talk to someone", "make a call", "busy", "uses"),
  "oven": ("a cook", "to bake something", "open the oven", "busy", "cooks with"),
  "book": ("a reader", "to read", "turn the page", "thoughtful", "reads"),
  "teddy bear": ("", "to cuddle it", "hug it", "cosy", "hugs"),
  "toothbrush": ("", "to clean the teeth", "brush the teeth", "fresh", "uses"),
}

PERSON = "person"
PERSON_WORDS = {"person", "figure", "man", "woman", "boy", "girl", "child", "lady", "guy", "player"}
