"""Word banks and sentence patterns of the demo data set (see make_demo.py); all sentences are our own.

Patterns hold `{slots}` that `make_demo.draw_cast` fills; a slot that starts with `a_` carries its article. A word
written `one>other` has two sides (present and past, wrong and right) that `make_demo.two_sides` tells apart.
"""


def _items(text: str) -> tuple[str, ...]:
    """Split a bank written as `one; two; three`."""
    return tuple(" ".join(item.split()) for item in text.split(";"))


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    """Split a bank of rows written as `a | b; c | d`."""
    return tuple(tuple(cell.strip() for cell in item.split("|")) for item in _items(text))


def _pairs(text: str) -> dict[str, str]:
    """Read a bank written as `a: b, c: d`."""
    return dict(pair.split(": ") for pair in text.split(", "))


WOMEN = _items("""Mia; Anna; Sofia; Leila; Priya; Keiko; Rosa; Ingrid; Amina; Clara; Elena; Zoe; Nadia;
    Freya; Lucia; Hannah; Yuki; Maria; Grace; Irene; Olga; Paula""")
MEN = _items("""Omar; Tom; Daniel; Kofi; Hugo; Pavel; Marco; Ravi; Jonas; Felix; Samuel; Diego; Henrik;
    Oscar; Ivan; Victor; Tariq; Ben; Luca; Peter; Simon; Karl""")
SURNAMES = _items("""Silva; Novak; Brown; Okafor; Lindberg; Rossi; Haddad; Moreau; Tanaka; Singh; Weber;
    Costa; Murphy; Jansen; Petrov; Mensah; Garcia; Larsen; Hall; Fischer""")
DAYS = _items("Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday")
# Slots with a bank of their own; `make_demo.draw_cast` draws one word of each.
BANKS = {
    "month": _items("""January; February; March; April; May; June; July; August; September; October;
        November; December"""),
    "shop": _items("""bakery; bookshop; cafe; flower shop; toy shop; hotel; tea room; bicycle shop; cinema;
        pharmacy; ice cream bar; art gallery; shoe shop; fish market"""),
    "thing": _items("""ladder; tent; camera; red umbrella; leather bag; gold ring; silver watch; old guitar;
        winter coat; violin; phone; suitcase; notebook; green scarf"""),
    "building": _items("library; town hall; museum; school; theatre; sports hall; market hall; art centre"),
    "animal": _items("dog; goat; pony; lamb; calf; cat; young fox; old donkey; swan; piglet"),
    "job": _items("""baker; nurse; teacher; farmer; plumber; pilot; engineer; dentist; artist; gardener;
        tailor; bus driver; cook; librarian"""),
    "contest": _items("baking; photo; spelling; singing; chess; poetry; dance; cooking; gardening; sewing"),
    "subject": _items("""pottery; painting; first aid; French; drawing; yoga; guitar; sewing; woodwork;
        Greek; dancing; judo"""),
    "club": _items("chess; tennis; book; rowing; cycling; garden; film; walking; swimming; hockey"),
    "cause": _items("""a new playground; the animal shelter; the fire brigade; school books;
        a hospital garden; the old bridge; flood victims; a youth orchestra"""),
    "goods": _items("stamps; apples; pencils; marbles; shells; coins; books; cards; beads; eggs; plates"),
    "event": _items("""dinner; the concert; the picnic; my birthday party; the quiz night; the book club;
        a game of chess; the barbecue; the film night"""),
    "reason": _items("""my train is delayed; my car has broken down; I missed the bus; the road is closed;
        I lost my keys; my son is ill; a meeting is running late; my bicycle has a flat tyre"""),
    "gift": _items("""the flowers; the lovely scarf; the birthday cake; the book; the help with the move;
        the lift to the station; the concert tickets; the homemade jam"""),
    "feat": _items("""passing the exam; winning the race; getting the new job; buying the house;
        finishing the course; learning to drive; publishing the book"""),
    "chore": _items("""send me the report; fix the printer; clean the kitchen; call the plumber;
        return my book; water the plants; pay the bill; move the car; print the tickets; feed the cat;
        book a table; wash the dishes; take out the rubbish; check my homework; sign the form;
        reply to my letter; sweep the floor; buy some milk; charge the laptop; order the paint;
        lock the garage; post the parcel; iron the shirts; pick up the keys"""),
}
TOWNS = _items("""Leeds; Porto; Lyon; Bergen; Ghent; Turin; Cork; Kyoto; Quito; Accra; Pune; Hanoi; Cusco;
    Malaga; Bristol; York; Galway; Bath; Graz; Basel; Utrecht; Aarhus; Tampere; Riga; Split; Verona; Seville;
    Nantes; Leipzig; Krakow""")

# Short passages: (text, one-sentence summary, {question: answer}).
STORIES = (
    ("{name} opened {a_shop} in {town} in {month} {year}. {They} paid {fortune} euros for the building and "
     "hired {n} people.",
     "{name} opened {a_shop} in {town} in {year} and hired {n} people to work there.",
     {"Who opened the {shop} in {town}?": "{name} opened the {shop} in {town}.",
      "Where did {name} open the {shop}?": "{name} opened the {shop} in {town}.",
      "When did {name} open the {shop}?": "{name} opened the {shop} in {month} {year}.",
      "How much did the building cost?": "The building in {town} cost {fortune} euros."}),
    ("On {day} {name} lost {a_thing} on the bus to {town}. The driver found it under a seat and got {n} "
     "euros as a thank-you.",
     "{name} lost {a_thing} on the bus to {town}, but the driver found it and was rewarded.",
     {"What did {name} lose?": "{name} lost {a_thing} on the bus to {town}.",
      "Where was the {thing} found?": "The {thing} was found under a seat on the bus to {town}.",
      "When did {name} lose the {thing}?": "{name} lost the {thing} on the bus to {town} on {day}.",
      "How much did the driver get?": "The driver got {n} euros for finding the {thing}."}),
    ("The {club} club of {town} held a sale on {day}. It sold {n} cakes and raised {sum} euros for {cause}.",
     "The {club} club of {town} sold cakes and raised {sum} euros for {cause}.",
     {"How much money did the club raise?": "The {club} club of {town} raised {sum} euros.",
      "When did the club hold the sale?": "The {club} club of {town} held the sale on {day}.",
      "What was the money for?": "The {club} club raised the money for {cause}.",
      "Who held a sale in {town}?": "The {club} club of {town} held a sale on {day}."}),
    ("Last {month} {name} and {friend} walked along the river near {town}. The walk took {few} days, and "
     "they slept in a tent each night.",
     "{name} and {friend} spent {few} days walking along the river near {town} last {month}.",
     {"Who walked along the river?": "{name} and {friend} walked along the river near {town}.",
      "How long did the walk take?": "The walk near {town} took {few} days.",
      "When was the walk?": "{name} and {friend} went for the walk last {month}."}),
    ("A storm hit {town} on {day} night. It broke {n} trees and blew the roof off the {building}, but nobody "
     "was hurt.",
     "A storm in {town} damaged trees and the {building}, but nobody was hurt.",
     {"When did the storm hit {town}?": "The storm hit {town} on {day} night.",
      "How many trees did the storm break?": "The storm in {town} broke {n} trees on {day} night.",
      "Which building lost its roof?": "The {building} in {town} lost its roof in the storm."}),
    ("{name}, {a_job} from {town}, rescued {a_animal} from a frozen lake on {day}. The {animal} is now safe "
     "on a farm owned by {friend}.",
     "{name} from {town} rescued {a_animal} from a frozen lake, and it is now safe on a farm.",
     {"Who rescued the {animal}?": "{name} from {town} rescued the {animal} from a frozen lake.",
      "Who owns the farm?": "{friend} owns the farm where the {animal} is now safe.",
      "When was the {animal} rescued?": "The {animal} was rescued from a frozen lake on {day}."}),
    ("The {building} in {town} will close in {month} for repairs. The work will take {few} weeks and cost "
     "{fortune} euros.",
     "The {building} in {town} will close in {month} for {few} weeks of repairs that cost {fortune} euros.",
     {"When will the {building} close?": "The {building} in {town} will close in {month}.",
      "How long will the work take?": "The work on the {building} in {town} will take {few} weeks.",
      "How much will the work cost?": "The work on the {building} in {town} will cost {fortune} euros."}),
    ("{name} won first prize in a {contest} contest in {town} on {day}. {They} beat {n} others and received "
     "{sum} euros.",
     "{name} beat {n} others to win first prize in a {contest} contest in {town}.",
     {"Who won first prize?": "{name} won first prize in the {contest} contest in {town}.",
      "Where was the {contest} contest?": "The {contest} contest that {name} won was in {town}.",
      "How much money did {name} receive?": "{name} received {sum} euros as first prize."}),
    ("{name} teaches {subject} at the {building} in {town}. The class meets every {day} at {few} o'clock and "
     "costs {n} euros a month.",
     "{name} teaches a weekly {subject} class at the {building} in {town} for {n} euros a month.",
     {"Where does the class meet?": "The {subject} class meets at the {building} in {town}.",
      "When does the class meet?": "The {subject} class meets every {day} at {few} o'clock.",
      "How much does the class cost?": "The {subject} class at the {building} costs {n} euros a month."}),
)

ORDERS = _items("""{chore} {when}!; You must {chore} {when}.; I want you to {chore} {when}.;
    {name}, {chore} {when}!""")
DEADLINES = _items("by {day}; before {few} o'clock; today; this evening; before lunch; tonight; at once")

# present>past
ACTIONS = _items("""bakes>baked fresh bread; writes>wrote long letters; drives>drove a yellow van;
    sings>sang old songs; swims>swam in the lake; takes>took photos of birds; buys>bought fresh fish;
    reads>read the news; drinks>drank mint tea; rides>rode a brown horse; feeds>fed the ducks;
    runs>ran in the park; teaches>taught two classes; makes>made apple jam; catches>caught small fish;
    draws>drew funny faces; grows>grew tomatoes; sells>sold flowers; tells>told good stories;
    builds>built model ships; meets>met old friends; speaks>spoke to the neighbours; plays>played the piano;
    studies>studied maps; mends>mended broken toys; carries>carried heavy boxes; cooks>cooked beans""")
TENSES = _items("""{name} {a} in the morning and {b} in the evening.;
    Every {day} {name} {a}, while {friend} {b}.; When it rains>rained, {name} {a} and {friend} {b}.;
    {name} lives>lived in {town}, where {they} {a} and {b}.;
    {name} works>worked as {a_job} and {a} after lunch.""")

AGENTS = _items("""the gardener; my uncle; two students; our neighbour; the mayor; the old baker;
    a young artist; the twins; my cousin; the new teacher; the children; a kind stranger; the nurse;
    the captain; three workers; the farmer; {name}; {name} and {friend}; the manager; my grandmother""")
# past | participle | objects. An object is plural exactly when it ends in "s".
DEEDS = _rows("""painted | painted | the fence, the old boat, both doors;
    drew | drawn | the plan, the cartoons; repaired | repaired | the clock, the roof, the bicycles;
    wrote | written | the letter, the report, both poems;
    broke | broken | the window, the blue cup, two chairs; took | taken | the photo, the keys;
    ate | eaten | the last cake, all the biscuits; built | built | the bridge, the stone wall, three sheds;
    found | found | the map, the lost dog, the coins; sold | sold | the house, the red car, the tickets;
    chose | chosen | the song, the menu, the colours; hid | hidden | the present, the letters;
    planted | planted | the apple tree, the roses; cooked | cooked | the soup, the potatoes;
    translated | translated | the book, the speech, the poems; carried | carried | the piano, the boxes;
    cut | cut | the hedge, the ribbon, the flowers; forgot | forgotten | the password, the tickets;
    washed | washed | the van, the floor, the curtains; opened | opened | the gate, the parcels""")
OCCASIONS = _items("last week; on {day}; in {month}; yesterday; this morning; before noon")

# wrong>right, all in the past so that any two fit together
MISTAKES = _items("""recieved>received a long letter; beleived>believed the story; forgot the adress>address;
    watched an intresting>interesting film; borrowed a calender>calendar; goed>went home early;
    seen>saw a white swan; didnt>didn't like the fish; bought to>too many apples; ate a>an apple;
    were>was late for work; found a>an old coin; waited untill>until noon; tryed>tried the soup;
    visited some freinds>friends; buyed>bought a ticket; runned>ran to the shop;
    wrote a buisness>business plan; felt realy>really tired; made a delicous>delicious cake;
    learned a forein>foreign language; booked a seperate>separate room; closed the libary>library door;
    missed the begining>beginning of the play; met a famous pianest>pianist;
    thinked>thought about the answer; bringed>brought some flowers; ordered two sandwichs>sandwiches;
    heared>heard a strange noise""")
MISTAKE_FRAMES = _items("""On {day} {name} {a} and {b}.; {name} {a} last week, while {friend} {b}.;
    In {town}, {name} {a} and {b}.; First {name} {a}, and then {they} {b}.""")

# opening | good points | bad points; the points at the same place speak of the same thing
REVIEWS = _rows("""We had dinner in {town} | the soup was hot, the waiter was friendly, the fish was fresh,
    the table was clean, the bread was warm, the price was fair | the soup was cold, the waiter was rude, the
    fish was dry, the table was dirty, the bread was stale, the price was too high;
    I stayed at a hotel in {town} | the room was quiet, the bed was soft, the breakfast was tasty, the staff
    were helpful, the shower was warm, the view was lovely | the room was noisy, the bed was hard, the
    breakfast was poor, the staff were unhelpful, the shower was cold, the view was ugly;
    {name} and I saw a film on {day} | the plot was clever, the acting was strong, the music was moving, the
    jokes were funny, the ending was surprising | the plot was dull, the acting was weak, the music was too
    loud, the jokes were flat, the ending was silly;
    I have used this phone since {month} | the battery lasts for days, the screen is bright, the camera is
    sharp, the buttons feel solid, the speaker is clear | the battery dies by noon, the screen is dim, the
    camera is blurry, the buttons feel loose, the speaker crackles""")
SAME_VIEW = _items("{a} and {b}.; I noticed that {a} and that {b}.; {a}, and {b} as well.; {a}. Also, {b}.")
MIXED_VIEW = _items("{a}, but {b}.; Although {a}, {b}.; {a}. However, {b}.; I found that {a}, yet {b}.")

# category | its plural | {thing: a true clause that follows "is a (category) that"}
THINGS = tuple((label, plural, _pairs(things)) for label, plural, things in _rows("""
    tool | tools | hammer: drives nails into wood, saw: cuts wood with sharp teeth, spade: digs
    holes in soil, rake: gathers fallen leaves, axe: chops logs, chisel: carves wood or stone, drill: makes
    round holes in walls, spanner: turns nuts and bolts, screwdriver: turns screws, trowel: spreads mortar
    between bricks;
    musical instrument | musical instruments | violin: has four strings and is held under the chin, guitar:
    usually has six strings, drum: is hit with sticks or hands, flute: is held sideways and blown, trumpet:
    is made of brass and blown, harp: has many strings that are plucked, piano: has black and white keys,
    xylophone: has bars that are hit with mallets, cello: has four strings and is held between the knees,
    accordion: is squeezed to make a sound;
    bird | birds | owl: hunts at night, penguin: swims well but cannot fly, ostrich: runs fast but cannot
    fly, eagle: hunts with sharp claws, swan: has a long neck and swims on lakes, parrot: can copy human
    speech, pigeon: often lives in cities, woodpecker: pecks holes in trees, robin: has a red breast,
    flamingo: has pink feathers and long legs;
    mammal | mammals | whale: lives in the sea, bat: can fly, camel: stores fat in its hump, giraffe: has a
    very long neck, elephant: has a long trunk, kangaroo: carries its young in a pouch, mole: digs tunnels
    underground, zebra: has black and white stripes, beaver: builds dams across rivers, hedgehog: is covered
    with spines, lion: lives in groups called prides;
    vehicle | vehicles | bicycle: has two wheels and pedals, bus: carries many passengers by road, train:
    runs on rails between towns, tractor: pulls machines on a farm, ambulance: takes sick people to hospital,
    lorry: carries heavy goods by road, taxi: takes passengers for a fare, tram: runs on rails in city
    streets, sledge: slides over snow;
    fruit | fruits | lemon: is yellow and sour, banana: is long and has yellow skin, cherry: is small and has
    a stone, coconut: has a hard shell and white flesh, grape: grows in bunches on a vine, fig: is soft and
    full of tiny seeds, mango: has orange flesh and a large flat stone, plum: has smooth skin and a stone,
    peach: has soft fuzzy skin, melon: is large and juicy, pineapple: has sweet yellow flesh and spiky
    leaves;
    vegetable | vegetables | carrot: is usually orange and grows underground, onion: has layers and can make
    eyes water, potato: grows underground and is often fried, leek: has a white stem and green leaves,
    cabbage: forms a round head of leaves, beetroot: is dark red and grows underground, cauliflower: has a
    large white head, radish: is small and peppery;
    building | buildings | lighthouse: guides ships at night, library: lends books to people, hospital: is
    used to treat sick people, windmill: uses wind to grind grain, museum: shows old or precious objects,
    stable: shelters horses, barn: stores hay and grain on a farm, castle: has thick walls against attack,
    cinema: shows films to the public, greenhouse: keeps plants warm behind glass, factory: is used to make
    goods with machines;
    insect | insects | bee: makes honey, butterfly: has large colourful wings, ant: lives in large colonies,
    ladybird: is often red with black spots, moth: usually flies at night, grasshopper: jumps with long back
    legs, dragonfly: hunts near water, beetle: has hard wing cases, wasp: is often striped and can sting"""))
PICTURES = _items("""{name} drew {x} in a notebook on {day}.; The picture book from {town} shows {x}.;
    The stamps in {name}'s album show {x}.; Last {day}, {name} made paper models of {x}.;
    On the wall of the {building}, {friend} painted {x}.""")

# larger unit | smaller unit | how many of the smaller make one of the larger
UNITS = _rows("""kilometres | metres | 1000; metres | centimetres | 100; centimetres | millimetres | 10;
    kilograms | grams | 1000; tonnes | kilograms | 1000; litres | millilitres | 1000; hours | minutes | 60;
    minutes | seconds | 60; days | hours | 24; weeks | days | 7; years | months | 12; feet | inches | 12;
    yards | feet | 3; pounds | ounces | 16; euros | cents | 100""")

# continent | {country: capital}
CAPITALS = tuple((continent, _pairs(cities)) for continent, cities in _rows("""
    Europe | France: Paris, Spain: Madrid, Italy: Rome, Germany: Berlin, Portugal: Lisbon,
    Austria: Vienna, Poland: Warsaw, Hungary: Budapest, Greece: Athens, Norway: Oslo, Sweden: Stockholm,
    Finland: Helsinki, Denmark: Copenhagen, Ireland: Dublin, Belgium: Brussels, Romania: Bucharest, Bulgaria:
    Sofia, Croatia: Zagreb, Serbia: Belgrade, Iceland: Reykjavik, Latvia: Riga, Estonia: Tallinn, Slovakia:
    Bratislava;
    Asia | Japan: Tokyo, China: Beijing, India: New Delhi, Thailand: Bangkok, Vietnam: Hanoi, Nepal:
    Kathmandu, Iraq: Baghdad, Iran: Tehran, Pakistan: Islamabad, South Korea: Seoul;
    Africa | Kenya: Nairobi, Ghana: Accra, Nigeria: Abuja, Morocco: Rabat, Ethiopia: Addis Ababa, Senegal:
    Dakar, Uganda: Kampala, Algeria: Algiers, Zambia: Lusaka;
    South America | Peru: Lima, Chile: Santiago, Argentina: Buenos Aires, Colombia: Bogotá, Ecuador: Quito,
    Uruguay: Montevideo;
    North America | Canada: Ottawa, Cuba: Havana"""))
# element | symbol | atomic number
ELEMENTS = _rows("""gold | Au | 79; silver | Ag | 47; iron | Fe | 26; copper | Cu | 29; tin | Sn | 50;
    lead | Pb | 82; sodium | Na | 11; potassium | K | 19; hydrogen | H | 1; helium | He | 2; carbon | C | 6;
    nitrogen | N | 7; oxygen | O | 8; zinc | Zn | 30; calcium | Ca | 20; neon | Ne | 10; nickel | Ni | 28;
    mercury | Hg | 80; iodine | I | 53; sulphur | S | 16; magnesium | Mg | 12; aluminium | Al | 13;
    chlorine | Cl | 17; silicon | Si | 14; phosphorus | P | 15; lithium | Li | 3; uranium | U | 92;
    platinum | Pt | 78; titanium | Ti | 22""")
SCIENCE = _rows("""Which planet is closest to the Sun? | Mercury is the planet closest to the Sun.;
    Which planet of the Solar System is the largest? | Jupiter is the largest planet of the Solar System.;
    How many legs does a spider have? | A spider has eight legs, two more than an insect.;
    At what temperature does water boil at sea level? | Water boils at 100 degrees Celsius at sea level.;
    At what temperature does water freeze? | Water freezes at 0 degrees Celsius at normal pressure.;
    Which gas do plants take in to make food? | Plants take in carbon dioxide to make food.;
    What force pulls objects down? | Gravity is the force that pulls objects down to the ground.;
    Which organ pumps blood? | The heart is the organ that pumps blood through the body.;
    How many sides does a hexagon have? | A hexagon is a shape that has six sides.;
    Which ocean is the largest? | The Pacific Ocean is the largest ocean on Earth.;
    What do bees collect from flowers? | Bees collect nectar and pollen from flowers.;
    Which star is closest to the Earth? | The Sun is the star closest to the Earth.;
    What is a young frog called? | A young frog is called a tadpole while it lives in water.;
    Which travels faster, light or sound? | Light travels much faster than sound does.;
    Which mountain is the highest? | Mount Everest is the highest mountain above sea level.;
    Which instrument measures temperature? | A thermometer is the instrument that measures temperature.;
    How many days are there in a leap year? | There are 366 days in a leap year.;
    What do caterpillars turn into? | Caterpillars turn into butterflies or moths.;
    How many bones does an adult human have? | An adult human usually has 206 bones.""")

# problem | answer; `demo.word_problem` says what the letters stand for
PROBLEMS = _rows("""{name} has {a} {goods} and buys {b} more. How many {goods} does {name} have now?
    | {a} + {b} = {a_plus_b}, so {name} now has {a_plus_b} {goods}.;
    {name} had {a_plus_b} {goods} and gave {a} of them to {friend}. How many {goods} are left?
    | {a_plus_b} - {a} = {b}, so {name} has {b} {goods} left.;
    One box holds {m} {goods}. How many {goods} are in {k} boxes?
    | {k} × {m} = {k_times_m}, so there are {k_times_m} {goods} in {k} boxes.;
    {name} shares {k_times_m} {goods} equally among {k} children. How many {goods} does each child get?
    | {k_times_m} ÷ {k} = {m}, so each child gets {m} {goods}.;
    One ticket to {town} costs {m} euros. How much do {k} tickets cost?
    | {k} × {m} = {k_times_m}, so {k} tickets to {town} cost {k_times_m} euros.;
    {name} reads {m} pages a day. How many pages does {name} read in {k} days?
    | {k} × {m} = {k_times_m}, so {name} reads {k_times_m} pages in {k} days.;
    A bus to {town} carries {a} people. At the next stop {k} people get off. How many people stay on the bus?
    | {a} - {k} = {a_minus_k}, so {a_minus_k} people stay on the bus.;
    {name} saved {a} euros and {friend} saved {b} euros. How much did they save together?
    | {a} + {b} = {a_plus_b}, so they saved {a_plus_b} euros together.""")

# {field name: slot} | sentences that hold a slot for each field
FORMS = tuple((_pairs(fields), sentences.split(" / ")) for fields, sentences in _rows("""
    Name: full, Age: age, Job: job, Town: town | {full} is a {age}-year-old {job} from {town}. /
    {full}, aged {age}, lives in {town} and works as {a_job}.;
    Name: full, Guests: few, Day: day, Time: time | {full} would like a table for {few} on {day} at {time}. /
    Please book a table on {day} at {time} for {few} people under the name {full}.;
    Customer: full, Item: goods, Quantity: n, Price: price | {full} ordered {n} {goods} for {price}. / An
    order of {n} {goods} at a total of {price} came from {full}.;
    Traveller: full, From: town, To: city, Month: month | {full} will travel from {town} to {city} in
    {month}. / In {month}, {full} is going to {city} by train from {town}.;
    Course: subject, Teacher: full, Place: building, Day: day | {full} teaches {subject} at the {building}
    every {day}. / Every {day} the {building} offers a class in {subject} with {full}.;
    Owner: full, Lost item: thing, Town: town, Day: day | On {day} {full} lost {a_thing} in {town}. / {full}
    reports {a_thing} that was lost in {town} on {day}."""))

# things | unit, lowest value, highest value, which value wins, comparative | the same for a second property
COMPARED = _rows("""bus, train, ferry, coach, tram, taxi | euros, 2, 60, low, cheaper | minutes, 10, 90, low,
    faster;
    red bag, blue bag, green bag, leather bag, sports bag | grams, 300, 950, low, lighter | euros, 15, 95,
    low, cheaper;
    oak, ash, beech, pine, elm, lime tree | metres, 9, 35, high, taller | years, 20, 180, high, older;
    sailing boat, rowing boat, fishing boat, motor boat | metres, 3, 15, high, longer | years, 2, 60, high,
    older;
    church tower, water tower, clock tower, bell tower | metres, 20, 90, high, taller | years, 30, 600, high,
    older;
    attic room, front room, corner room, garden room | square metres, 9, 30, high, larger | euros, 250, 690,
    low, cheaper;
    spaniel, terrier, collie, poodle, beagle | kilograms, 6, 25, high, heavier | years, 2, 14, high, older;
    forest path, river path, coast path, hill path | kilometres, 2, 19, low, shorter | metres wide, 2, 6,
    high, wider""")

# what the message should do | the message
MESSAGES = (
    ("saying that I will be late for {event} because {reason}",
     "Hi {name}, I am sorry, but I will be late for {event} because {reason}."),
    ("inviting {them} to {event} on {day}",
     "Hi {name}, would you like to come to {event} on {day}? I hope you can make it."),
    ("thanking {them} for {gift}", "Hi {name}, thank you so much for {gift}. It was very kind of you."),
    ("reminding {them} to {chore} by {day}",
     "Hi {name}, this is a friendly reminder to {chore} by {day}. Thank you!"),
    ("asking to borrow {their} {thing} on {day}",
     "Hi {name}, could I please borrow your {thing} on {day}? I will take good care of it."),
    ("congratulating {them} on {feat}", "Hi {name}, congratulations on {feat}! You must be very happy."),
)

# heading of the list | the sentence | what the list may hold
LISTS = _rows("""Shopping list of {name} | {name} needs to buy {x}. | flour, eggs, butter, salt, rice, tea,
    soap, honey, apples, bread, cheese, candles;
    Suitcase of {name} for {town} | {name} packed {x} for {town}. | two shirts, a towel, a map, warm socks, a
    camera, a raincoat, a novel, sunglasses, a toothbrush, walking boots;
    On the menu in {town} | The menu in {town} offers {x}. | bean soup, fried fish, rice salad, plum cake,
    onion tart, grilled corn, lamb stew, noodles, lemon ice;
    Jobs of {name} for {day} | On {day}, {name} has to {x}. | mow the lawn, paint the door, call the bank,
    wash the car, bake a cake, pay the rent, visit the dentist, clean the windows;
    Seen by {name} in {town} | In {town}, {name} saw {x}. | an old castle, a stone bridge, two museums, the
    harbour, a puppet show, a rose garden, the market, a clock tower;
    Subjects of {name} | {name} is studying {x}. | history, biology, music, chemistry, Spanish, geography,
    drama, physics, art""")

# a place and a measure and what it deals with
PLACES = _items("""school; hospital; harbour; airport; library; zoo; town hall; hotel; railway station;
    university; factory; museum; sports centre; market""")
MEASURES = _rows("""solar panels | energy costs; bicycle racks | car traffic;
    water filters | water pollution; rain barrels | water use; thick curtains | street noise;
    new windows | heat loss; security cameras | theft; smoke alarms | fire risk; shade trees | summer heat;
    ticket machines | long queues; air filters | dust; paper bags | plastic waste; food scales | food waste;
    handrails | falls; online booking | waiting times; electric vans | exhaust fumes""")
PLANS = _items("""The {place} in {town} will use {means} to reduce {aim}.;
    To cut down on {aim}, the {place} in {town} has paid for {means}.;
    {name} hopes that {means} will help the {place} against {aim}.;
    Because of {aim}, the {place} is going to try {means} in {month}.;
    Will {means} help against {aim}? The {place} in {town} wants to find out.""")
