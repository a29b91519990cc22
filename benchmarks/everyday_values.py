"""Everyday criteria with the values that anybody would name, to measure lists of texts.

`DEVELOPMENT` may be looked at while the generator is changed. `HELD_OUT` is only scored. Both were
written by hand before any list of a language model for them had been seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from crl_sdk.basis._votes import text_key


@dataclass(frozen=True, slots=True)
class Coverage:
    """How well a list of texts covers a criterion.

    Attributes:
        named: Number of obvious values that the list names.
        obvious: Number of obvious values.
        fitting: Number of further texts that fit the criterion.
        junk: Texts that are neither, in the order of the list.
    """

    named: int
    obvious: int
    fitting: int
    junk: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a criterion.

    Attributes:
        obvious: Values that anybody would name, each with its synonyms, separated by `/`.
        fitting: Further texts that are no junk.
    """

    obvious: tuple[str, ...]
    fitting: tuple[str, ...]

    def coverage(self, criterion: str, texts: Iterable[str]) -> Coverage:
        """Compare a list of texts with the values.

        A text names a value if the two are equal but for case, articles and plurals, or if one
        of them has the name of the criterion in addition, such as "oval shape".
        """
        by_key = {
            key: index
            for index, value in enumerate(self.obvious)
            for synonym in value.split("/")
            for key in _keys(criterion, synonym)
        }
        fitting = {key for text in self.fitting for key in _keys(criterion, text)}
        named, others, junk = set[int](), 0, list[str]()
        for text in texts:
            keys = _keys(criterion, text)
            if found := [by_key[key] for key in keys if key in by_key]:
                named.add(found[0])
            elif any(key in fitting for key in keys):
                others += 1
            else:
                junk.append(text)
        return Coverage(len(named), len(self.obvious), others, tuple(junk))


def _keys(criterion: str, text: str) -> Sequence[str]:
    """Return the key of a text, and that of the text without the words of the criterion."""
    key = text_key(text)
    own = set(text_key(criterion).split())
    rest = " ".join(word for word in key.split() if word not in own)
    return (key, rest) if rest and rest != key else (key,)


def _values(obvious: str, fitting: str) -> Values:
    return Values(
        tuple(each.strip() for each in obvious.split(",")),
        tuple(each.strip() for each in fitting.split(",")),
    )


DEVELOPMENT: Mapping[str, Values] = {
    "season": _values(
        "spring/springtime, summer/summertime, autumn/fall, winter/wintertime",
        "rainy season, dry season, monsoon, harvest, early spring, late spring, early summer, "
        "late summer, midsummer, early autumn, late autumn, midwinter, late winter, early winter, "
        "wet season, christmas, holiday, easter, blooming season, hot season, cold season",
    ),
    "mood": _values(
        "happy/joyful/cheerful, sad/sorrowful/unhappy, angry/furious/mad, calm/relaxed/peaceful, "
        "excited, bored, afraid/scared/fearful/frightened, lonely, anxious/worried/nervous, "
        "romantic/loving",
        "tired, gloomy, hopeful, nostalgic, melancholy, melancholic, playful, serious, tense, "
        "mysterious, surprised, proud, confused, depressed, content, grateful, jealous, ashamed, "
        "guilty, disgusted, dreamy, energetic, enthusiastic, frustrated, irritated, optimistic, "
        "pessimistic, quiet, serene, stressed, upset, thoughtful, shy, confident, curious, "
        "disappointed, dark, light, warm, cold, tranquil, amused, silly, sleepy, sentimental, "
        "envious, embarrassed, hurt, eager, inspired, moody, grumpy, lazy, intense, somber",
    ),
    "weather": _values(
        "sunny/sunshine/sun, rainy/rain/raining, cloudy/clouds/cloud, snowy/snow/snowing, "
        "foggy/fog/mist/misty, windy/wind, stormy/storm/thunderstorm, clear/clear sky, "
        "overcast/gray/grey, hail/hailing/icy/ice/sleet",
        "hot, cold, warm, cool, humid, dry, wet, dusty, hazy, haze, freezing, frosty, frost, "
        "lightning, thunder, tornado, hurricane, blizzard, drizzle, drizzly, partly cloudy, "
        "breezy, breeze, mild, chilly, heat wave, rainbow, damp, showers, sandstorm, typhoon, "
        "heavy rain, light rain, partly sunny, mostly cloudy, mostly sunny, monsoon, gale, gusty, "
        "calm, bright, dark",
    ),
    "vehicle": _values(
        "car/automobile, truck/lorry, bus, bicycle/bike, motorcycle/motorbike, train, "
        "boat, airplane/plane/aircraft/aeroplane, van/minivan, ship",
        "suv, taxi, cab, tractor, scooter, helicopter, tram, trolley, subway, ambulance, fire "
        "truck, police car, pickup, pickup truck, trailer, wagon, sedan, jeep, convertible, "
        "limousine, coupe, sports car, racing car, race car, school bus, moped, camper, rv, "
        "caravan, bulldozer, excavator, forklift, tank, rocket, spaceship, submarine, yacht, "
        "sailboat, ferry, canoe, kayak, jet, jet ski, snowmobile, cart, carriage, rickshaw, "
        "skateboard, hatchback, station wagon, motor home, locomotive, hovercraft, glider, hot "
        "air balloon, golf cart, tricycle, electric car, barge, cruise ship, delivery van",
    ),
    "material": _values(
        "wood/wooden, metal/metallic/steel/iron, glass, plastic, stone/rock/marble, "
        "fabric/cloth/textile/cotton, leather, paper/cardboard, ceramic/ceramics/clay/porcelain, "
        "rubber",
        "wool, silk, linen, gold, silver, copper, bronze, brass, aluminum, aluminium, concrete, "
        "brick, granite, bamboo, nylon, polyester, denim, velvet, suede, fur, foam, wax, sand, "
        "straw, rope, bone, ivory, cork, tile, cement, plaster, titanium, tin, lead, crystal, "
        "diamond, fiberglass, acrylic, carbon fiber, slate, terracotta, wicker, felt, canvas, "
        "lace, satin, vinyl, zinc, nickel, chrome, pearl, shell, feather, plywood, hemp, resin, "
        "oak, pine, limestone, sandstone, quartz, stainless steel",
    ),
    "time of day": _values(
        "morning, noon/midday, afternoon, evening, night/nighttime, "
        "dawn/sunrise/daybreak, dusk/sunset/twilight, midnight",
        "early morning, late morning, early afternoon, late afternoon, late evening, early "
        "evening, late night, golden hour, blue hour, daytime, day, lunchtime, dinner time, "
        "breakfast, lunch, dinner, bedtime, mid morning, mid afternoon, mid-day, before dawn, "
        "sundown, nightfall, am, pm",
    ),
    "fruit": _values(
        "apple, banana, orange, grape, strawberry, pear, peach, lemon, cherry, watermelon",
        "pineapple, mango, kiwi, lime, plum, blueberry, raspberry, blackberry, apricot, melon, "
        "grapefruit, coconut, papaya, fig, pomegranate, cranberry, avocado, date, guava, lychee, "
        "nectarine, tangerine, mandarin, clementine, cantaloupe, honeydew, passion fruit, "
        "persimmon, quince, currant, gooseberry, dragon fruit, kumquat, tomato, olive, raisin, "
        "prune, mulberry, star fruit, jackfruit, berry, citrus, rhubarb, durian, plantain",
    ),
    "room": _values(
        "kitchen, bedroom, bathroom/bath/restroom/toilet, living room/lounge/sitting room, "
        "dining room, office/study, garage, hallway/hall/corridor, basement/cellar, "
        "laundry room/laundry/utility room",
        "attic, closet, pantry, library, nursery, classroom, balcony, porch, patio, playroom, "
        "guest room, family room, den, gym, foyer, entryway, lobby, conference room, meeting "
        "room, waiting room, storage room, storage, workshop, sunroom, conservatory, loft, "
        "master bedroom, game room, media room, studio, wine cellar, staircase, bar, ballroom, "
        "theater, dressing room, shower, powder room, mudroom, home office, cafeteria, hotel room",
    ),
    "hair color": _values(
        "black, brown/brunette, blonde/blond/yellow, red/ginger/auburn, gray/grey/silver, white",
        "dark brown, light brown, dark blonde, light blonde, strawberry blonde, platinum blonde, "
        "platinum, chestnut, golden, gold, copper, blue, green, pink, purple, orange, dark, "
        "light, sandy, dyed, highlights, burgundy, salt and pepper, mahogany, honey, caramel, "
        "dirty blonde, jet black, violet, ash, ash blonde, teal, multicolored, rainbow, hazel",
    ),
    "holiday": _values(
        "christmas/xmas, halloween, easter, thanksgiving, new year/new years/new year's, "
        "valentine's day/valentines day/valentine/valentines, birthday, "
        "independence day/fourth of july/july 4th, hanukkah, summer/summer vacation/beach",
        "mother's day, mothers day, father's day, fathers day, labor day, memorial day, st "
        "patrick's day, st patricks day, diwali, ramadan, eid, passover, chinese new year, lunar "
        "new year, kwanzaa, carnival, mardi gras, good friday, new year's eve, christmas eve, "
        "boxing day, columbus day, veterans day, presidents day, earth day, may day, anniversary, "
        "wedding, winter, spring break, day of the dead, holi, memorial, family, vacation, winter "
        "vacation, ski trip, weekend, bank holiday, martin luther king day",
    ),
}

HELD_OUT: Mapping[str, Values] = {
    "color": _values(
        "red, orange, yellow, green, blue, purple/violet, pink, brown, black, white",
        "gray, grey, gold, silver, turquoise, teal, beige, maroon, navy, cyan, magenta, lavender, "
        "indigo, crimson, scarlet, tan, olive, lime, peach, cream, ivory, bronze, copper, dark "
        "blue, light blue, dark green, light green, navy blue, sky blue, burgundy, khaki, coral, "
        "mint, aqua, fuchsia, mauve, amber, charcoal, rose, ruby, emerald, golden, dark red, "
        "light brown, dark brown, bright red, royal blue, lilac, plum, salmon, rust, mustard, "
        "transparent, multicolored, rainbow, azure, aquamarine, lemon, ochre, dark purple, "
        "bright green, bright blue, bright yellow, deep blue, pale blue, hot pink, pastel",
    ),
    "shape": _values(
        "circle/round/circular/disc/disk, square, triangle/triangular, rectangle/rectangular, "
        "star/star shaped, heart/heart shaped, oval/ellipse/elliptical/egg shaped, "
        "cube/cubic/box, sphere/spherical/ball/globe, cone/conical/cone shaped",
        "cylinder, cylindrical, pyramid, diamond, hexagon, hexagonal, pentagon, octagon, cross, "
        "crescent, ring, arrow, spiral, polygon, trapezoid, rhombus, parallelogram, teardrop, "
        "line, curve, curved, straight, flat, irregular, long, narrow, wide, tall, thin, thick, "
        "prism, torus, wavy, zigzag, pointed, pear shaped, bell, tube, tubular, semicircle, half "
        "circle, half moon, moon, angular, asymmetrical, symmetrical, dome, arch, donut, "
        "octagonal, pentagonal, rectangular prism, hemisphere, leaf, oblong, cuboid, disk shaped",
    ),
    "pattern": _values(
        "striped/stripes/stripe/stripy, polka dot/polka dots/dotted/dots/dot/spotted/spots, "
        "checkered/checked/checkerboard/checks/check/chequered, plaid/tartan, floral/flowers/"
        "flower/flowery, solid/plain, zigzag/chevron/herringbone, "
        "geometric/geometrical/geometry, leopard/leopard print/animal print/animal/zebra, "
        "paisley",
        "grid, wavy, waves, wave, abstract, camouflage, houndstooth, argyle, spiral, diamond, "
        "diamonds, lace, gingham, ombre, gradient, tie dye, marble, mosaic, hearts, stars, "
        "circles, circle, triangles, triangle, squares, square, hexagon, swirl, swirls, lines, "
        "line, cross, crisscross, fractal, symmetrical, repeating, random, honeycomb, tile, "
        "tiled, damask, ikat, basket weave, woven, knitted, quilted, speckled, mottled, scales, "
        "brick, vertical stripes, horizontal stripes, diagonal, diagonal stripes, pinstripe, "
        "pinstriped, star, leaf, leaves, printed, embroidered, patchwork, tropical, lattice, "
        "spirals, curved, wood grain, snake, snakeskin, tiger, irregular, regular, heart",
    ),
    "animal habitat": _values(
        "forest/woodland/woods/wood, ocean/sea/marine, desert, "
        "grassland/savanna/savannah/prairie/plains/meadow/field/pasture, "
        "river/stream, lake/pond, mountain/mountains/hills, jungle/rainforest/tropical forest, "
        "arctic/tundra/ice/polar/snow, swamp/wetland/marsh/bog",
        "cave, beach, coast, coral reef, reef, farm, zoo, city, urban, garden, park, sky, tree, "
        "trees, underground, burrow, nest, aquarium, island, shore, estuary, mangrove, cliff, "
        "valley, canyon, house, home, barn, stable, backyard, water, land, freshwater, saltwater, "
        "bush, scrub, steppe, taiga, pine forest, temperate forest, hive, den, underwater, "
        "countryside, hillside, waterfall, sand, dunes, deep sea, brush, bamboo forest, air, "
        "oasis, rocks, grass, cage, kennel, wild, outback, shoreline, riverbank, canopy, ground",
    ),
    "art style": _values(
        "impressionism/impressionist, abstract/abstraction, realism/realistic/realist, "
        "cubism/cubist, surrealism/surrealist/surreal, pop art/pop, "
        "renaissance, baroque, modern/modernism/contemporary/modern art, "
        "expressionism/expressionist",
        "romanticism, romantic, gothic, minimalism, minimalist, art deco, art nouveau, classical, "
        "classicism, neoclassical, neoclassicism, futurism, dada, dadaism, postmodern, conceptual, "
        "cartoon, comic, anime, manga, graffiti, street art, folk art, photorealism, "
        "hyperrealism, fauvism, pointillism, rococo, symbolism, watercolor, oil painting, "
        "sketch, drawing, pencil drawing, pixel art, digital, digital art, ink, charcoal, pastel, "
        "acrylic, fresco, mosaic, sculpture, collage, printmaking, woodcut, photography, "
        "landscape, portrait, still life, figurative, primitive, naive, tribal, oriental, "
        "japanese, chinese, medieval, byzantine, victorian, vintage, retro, painting, "
        "illustration, caricature, fantasy, traditional, naturalism, constructivism, op art, "
        "abstract expressionism, post impressionism, mannerism, bauhaus, calligraphy",
    ),
    "food": _values(
        "pizza, bread/toast, rice, pasta/spaghetti/noodles/noodle, salad, soup/stew, "
        "meat/beef/steak/pork, chicken/poultry, fish/seafood/sushi, cake/dessert/pie",
        "burger, hamburger, sandwich, hot dog, fries, french fries, cheese, egg, eggs, fruit, "
        "vegetable, vegetables, potato, potatoes, bacon, ham, sausage, turkey, lamb, shrimp, "
        "salmon, tuna, tacos, taco, burrito, curry, pancake, pancakes, waffle, cereal, oatmeal, "
        "yogurt, chocolate, candy, cookie, cookies, ice cream, donut, muffin, croissant, bagel, "
        "popcorn, chips, nuts, beans, tofu, apple, banana, orange, tomato, carrot, carrots, "
        "onion, corn, mushroom, lettuce, cucumber, broccoli, spinach, pepper, garlic, butter, "
        "milk, honey, sugar, salt, sauce, breakfast, lunch, dinner, snack, appetizer, omelette, "
        "lasagna, dumplings, lobster, crab, grapes, strawberries, strawberry, pudding, brownie, "
        "pastry, peanut butter, jam, barbecue, ribs, kebab, nachos, wheat, grain, cabbage, peas, "
        "pumpkin, lemon, peach, pear, pineapple, watermelon, cream, biscuit, meatballs, ramen",
    ),
    "drink": _values(
        "water/mineral water, coffee/espresso/cappuccino/latte, tea/green tea/iced tea, "
        "juice/orange juice/fruit juice/apple juice, beer, wine/red wine/white wine, milk, "
        "soda/cola/coke/soft drink/lemonade, cocktail/martini/margarita/mojito, "
        "whiskey/whisky/vodka/rum/gin/liquor/spirits/brandy/tequila",
        "champagne, hot chocolate, cocoa, smoothie, milkshake, cider, energy drink, sports drink, "
        "punch, sake, bourbon, scotch, ale, lager, ginger ale, tonic, root beer, iced coffee, "
        "pepsi, sprite, sparkling water, coconut water, tomato juice, grape juice, cranberry "
        "juice, pineapple juice, lemon juice, kombucha, eggnog, sherry, port, liqueur, vermouth, "
        "cognac, alcohol, mocha, herbal tea, black tea, hot tea, lime juice, club soda, "
        "tonic water, soy milk, almond milk, pina colada, daiquiri, bloody mary, mead, stout",
    ),
    "sport": _values(
        "football/american football, soccer, basketball, tennis, baseball, "
        "swimming, running/athletics/track/track and field/jogging/marathon, golf, "
        "cycling/biking/bicycling, skiing/snowboarding/ski",
        "hockey, ice hockey, field hockey, volleyball, cricket, rugby, boxing, wrestling, "
        "gymnastics, surfing, skating, ice skating, figure skating, skateboarding, badminton, "
        "table tennis, ping pong, archery, fencing, rowing, sailing, diving, karate, judo, "
        "martial arts, taekwondo, climbing, rock climbing, hiking, yoga, horse riding, horseback "
        "riding, equestrian, polo, water polo, lacrosse, softball, bowling, dodgeball, handball, "
        "motor racing, racing, weightlifting, triathlon, squash, racquetball, canoeing, kayaking, "
        "fishing, hunting, darts, billiards, snooker, chess, dancing, cheerleading, curling, "
        "bobsled, luge, high jump, long jump, pole vault, javelin, discus, sprint, hurdles, "
        "walking, camping, mountain biking, windsurfing, water skiing, scuba diving, snorkeling, "
        "parkour, crossfit, aerobics, fitness, exercise, ultimate frisbee, frisbee, kickboxing",
    ),
    "musical instrument": _values(
        "guitar/electric guitar/acoustic guitar, piano/keyboard, drums/drum/percussion/drum set, "
        "violin/fiddle, flute, trumpet, saxophone/sax, cello, clarinet, harp",
        "bass, bass guitar, viola, trombone, tuba, oboe, bassoon, french horn, horn, organ, "
        "accordion, banjo, mandolin, ukulele, harmonica, xylophone, recorder, tambourine, "
        "cymbals, cymbal, bagpipes, sitar, lute, synthesizer, double bass, piccolo, bongo, "
        "bongos, maracas, triangle, bell, bells, gong, harpsichord, marimba, timpani, snare drum, "
        "bass drum, lyre, zither, koto, didgeridoo, pan flute, string, strings, woodwind, brass, "
        "vibraphone, glockenspiel, castanets, kazoo, cornet, euphonium, conga, djembe, tabla, "
        "steel drum, whistle, kettle drum, concertina",
    ),
    "furniture": _values(
        "chair/armchair, table/coffee table/dining table, sofa/couch, bed, desk, "
        "bookshelf/bookcase/shelf/shelves, cabinet/cupboard, wardrobe/closet/armoire, "
        "dresser/chest of drawers/drawers/drawer, stool/bench/ottoman/footstool",
        "lamp, rug, carpet, mirror, nightstand, bedside table, end table, side table, loveseat, "
        "recliner, rocking chair, futon, crib, bunk bed, mattress, sideboard, tv stand, console "
        "table, chest, coat rack, hutch, buffet, office chair, dining chair, bar stool, barstool, "
        "curtain, curtains, pillow, pillows, cushion, cradle, vanity, filing cabinet, hammock, "
        "picture frame, lounge chair, chandelier, fireplace, kitchen cabinet, kitchen table, "
        "picnic table, dining room table, headboard, sectional, chaise, trunk, rack, bureau, "
        "credenza, wooden chair, wooden table, leather sofa, leather chair, bean bag, television",
    ),
    "building": _values(
        "house/home/cottage/villa/bungalow, apartment/apartment building/flat/condo/"
        "apartment block, skyscraper/tower/high rise, church/cathedral/chapel/temple/mosque, "
        "school/university/college, hospital/clinic, office/office building, "
        "castle/palace/fortress/fort, barn/farm/farmhouse/shed, "
        "shop/store/mall/shopping mall/supermarket/shopping center/market",
        "factory, warehouse, museum, library, hotel, motel, restaurant, cafe, theater, theatre, "
        "stadium, arena, airport, station, train station, bus station, police station, fire "
        "station, bank, post office, city hall, courthouse, prison, jail, lighthouse, garage, "
        "cabin, hut, mansion, bridge, gas station, windmill, mill, monument, monastery, pagoda, "
        "pyramid, dome, greenhouse, gym, cinema, bar, pub, embassy, dormitory, townhouse, "
        "duplex, log cabin, tent, igloo, synagogue, shrine, silo, power plant, parking garage, "
        "residential, commercial, industrial, public, government, hall, town hall, "
        "concert hall, opera house, kindergarten, laboratory, studio, parliament, capitol, dam, "
        "gothic, modern, brick, wooden, stone, concrete, glass, courtyard, terrace, ruin",
    ),
    "landscape": _values(
        "mountain/mountains/hills/hill, beach/coast/seaside/shore/coastline, forest/woods/"
        "woodland, desert/dunes, lake/pond, river/stream, sea/ocean/seascape, "
        "field/meadow/farmland/grassland/plain/plains/prairie, "
        "city/urban/cityscape/skyline, valley/canyon/gorge",
        "waterfall, jungle, rainforest, island, cliff, glacier, snow, volcano, swamp, wetland, "
        "tundra, savanna, countryside, rural, village, garden, park, cave, sky, sunset, road, "
        "bay, lagoon, vineyard, farm, pasture, orchard, rock, rocks, rocky, sand, tree, trees, "
        "grass, plateau, mesa, marsh, bog, reef, coral reef, iceberg, arctic, oasis, suburb, "
        "town, hillside, steppe, moor, heath, snowy, mountain range, flowers, wilderness, cloud, "
        "clouds, harbor, bridge, street, path, trail, ruins, lava, ice, water, snowy mountains, "
        "tropical, barren, lush, coastal, mountainous, hilly, flat, wooded, peninsula, fjord",
    ),
    "lighting": _values(
        "bright/well lit, dark/dim/dimly lit/low light/low, natural/daylight/natural light/"
        "sunlight/sunny/sun, artificial/artificial light/electric, "
        "soft/diffuse/diffused/soft light, harsh/hard/direct, backlit/backlight/silhouette/"
        "back light, candlelight/candle/candles/candlelit/firelight, neon/neon light, "
        "warm/golden/golden hour/warm light",
        "cold, cool, spotlight, lamp, lamps, studio, studio light, fluorescent, led, "
        "incandescent, moonlight, sunset, sunrise, twilight, shadow, shadowy, ambient, dramatic, "
        "flash, overhead, side light, indirect, street light, streetlight, chandelier, lantern, "
        "fire, light, flashlight, torch, colorful, colored, white, yellow, blue, red, flickering, "
        "glowing, strobe, halogen, light bulb, bulb, overcast, gloomy, night, day, floodlight, "
        "laser, indoor, outdoor, moody, even, uneven, high contrast, ceiling, wall, desk lamp, "
        "floor lamp, table lamp, track, recessed, pendant, rim light, high key, low key, stage",
    ),
    "facial expression": _values(
        "smile/smiling/happy/happiness/joy/joyful/grin/grinning/laughing/laugh, "
        "sad/sadness/crying/cry/tearful/unhappy, angry/anger/mad/furious/scowl/scowling, "
        "surprised/surprise/shocked/astonished/amazed, "
        "fear/fearful/afraid/scared/frightened/terrified, disgust/disgusted, "
        "neutral/blank/expressionless/calm/relaxed, frown/frowning, "
        "confused/confusion/puzzled, bored/boredom/tired/sleepy",
        "excited, excitement, serious, contempt, shy, embarrassed, worried, anxious, nervous, "
        "thoughtful, winking, wink, pouting, pout, smirk, smirking, proud, curious, suspicious, "
        "sneer, yawning, screaming, shouting, pain, pained, content, cheerful, depressed, "
        "concerned, skeptical, amused, delighted, disappointed, love, loving, hopeful, "
        "determined, grimace, smug, sleeping, raised eyebrows, open mouth, closed eyes, tongue "
        "out, kiss, kissing, concentration, focused, hate, jealous, guilty, ashamed, stern, "
        "grumpy, annoyed, frustrated, gloomy, stressed, upset, hurt, interested, playful, eager",
    ),
    "hairstyle": _values(
        "long/long hair, short/short hair, curly/curls/curly hair, straight/straight hair, "
        "bald/shaved/shaved head/bald head, ponytail/pony tail, braid/braids/braided/plaits/plait, "
        "bun/top knot/chignon, bob/bob cut, afro/dreadlocks/dreads/cornrows",
        "wavy, wavy hair, mohawk, buzz cut, crew cut, pixie, pixie cut, bangs, fringe, layered, "
        "mullet, pigtails, updo, spiky, slicked back, medium length, medium, shoulder length, "
        "frizzy, undercut, fade, quiff, pompadour, bouffant, messy, side part, middle part, comb "
        "over, curtain bangs, french braid, twist, twists, extensions, wig, highlights, thick, "
        "thin, dyed, blonde, black, brown, red, perm, permed, beehive, shag, bowl cut, flat top, "
        "cropped, loose, french twist, dutch braid, half up, natural, beard, curly bob, "
        "ponytails, tousled, sleek, crimped, side swept, knot, locks, straightened, ringlets",
    ),
    "occupation": _values(
        "doctor/physician/surgeon, teacher/professor, nurse, police officer/policeman/police/cop, "
        "firefighter/fireman, chef/cook, farmer, engineer, "
        "lawyer/attorney/judge, builder/construction worker/carpenter/laborer/worker/mechanic",
        "driver, pilot, soldier, scientist, artist, musician, actor, singer, writer, journalist, "
        "photographer, waiter, waitress, cashier, salesman, secretary, accountant, programmer, "
        "dentist, pharmacist, veterinarian, plumber, electrician, painter, baker, butcher, tailor, "
        "barber, hairdresser, fisherman, sailor, athlete, student, businessman, manager, "
        "librarian, architect, dancer, model, janitor, cleaner, maid, gardener, priest, nun, "
        "monk, politician, president, banker, clerk, bartender, guard, security guard, "
        "therapist, psychologist, designer, consultant, miner, welder, blacksmith, potter, "
        "weaver, shopkeeper, merchant, trader, hunter, astronaut, flight attendant, stewardess, "
        "detective, coach, trainer, nanny, author, editor, reporter, technician, truck driver, "
        "taxi driver, bus driver, postman, mailman, receptionist, researcher, entrepreneur, "
        "social worker, salesperson, office worker, software engineer, executive, homemaker, "
        "housewife, retired, paramedic, physical therapist, craftsman, mason, poet, director, "
        "biologist, chemist, physicist, economist, historian, translator, analyst, administrator",
    ),
    "footwear": _values(
        "sneakers/sneaker/trainers/tennis shoes/running shoes/athletic shoes/sports shoes, "
        "boots/boot/ankle boots, sandals/sandal, heels/high heels/high heel/stilettos/pumps, "
        "slippers/slipper, flip flops/flip flop, loafers/loafer/moccasins/slip ons, "
        "dress shoes/oxfords/oxford/formal shoes/leather shoes, flats/ballet flats/ballerinas, "
        "barefoot/socks/sock/bare feet/stockings",
        "shoes, shoe, clogs, wedges, platforms, platform shoes, mules, cleats, rain boots, snow "
        "boots, hiking boots, cowboy boots, rubber boots, work boots, ski boots, roller skates, "
        "ice skates, espadrilles, brogues, crocs, wellingtons, galoshes, high tops, skates, "
        "tights, leather boots, walking shoes, basketball shoes, canvas shoes, boat shoes, "
        "combat boots, winter boots, knee high boots, thigh high boots, hiking shoes, ballet "
        "shoes, soccer cleats, golf shoes, football boots, riding boots, water shoes, wedge",
    ),
    "age": _values(
        "baby/infant/newborn, toddler, child/kid/children/young child/boy/girl, "
        "teenager/teen/adolescent/teenage/teens, "
        "young adult/young/young man/young woman/youth/twenties, "
        "adult/grown up/man/woman, middle aged/middle age/middle/forties, "
        "elderly/senior/old/old man/old woman/aged/senior citizen",
        "preschooler, preteen, mature, ancient, new, retired, centenarian, thirties, fifties, "
        "sixties, seventies, eighties, nineties, juvenile, puppy, kitten, vintage, modern, "
        "antique, older adult, old age, childhood, adulthood, adolescence, infancy, early "
        "childhood, grandparent, younger, older, minor, school age, primary school, grandfather, "
        "grandmother, 10 years old, 20 years old, one year, two years, 20s, 30s, 40s, 50s, 60s, "
        "70s, 80s, 90s, youthful, late teens, early twenties, student, college, youngster",
    ),
    "activity": _values(
        "running/jogging/run, walking/walk/hiking/strolling, eating/dining/eat, sleeping/sleep/"
        "resting/napping, reading/read/studying, swimming/swim, dancing/dance, "
        "cooking/baking/cook, working/work/typing, playing/play/playing games/gaming",
        "talking, singing, writing, drawing, painting, shopping, driving, riding, cycling, "
        "biking, climbing, fishing, camping, cleaning, gardening, drinking, sitting, standing, "
        "jumping, watching tv, listening to music, listening, exercising, exercise, yoga, "
        "skiing, skating, surfing, sailing, boating, traveling, travelling, photography, "
        "football, soccer, basketball, tennis, golf, baseball, playing music, playing guitar, "
        "washing, fighting, hugging, kissing, laughing, crying, relaxing, sports, sport, "
        "gymnastics, meditation, meditating, bowling, boxing, wrestling, horse riding, hunting, "
        "kayaking, canoeing, sewing, knitting, crafts, building, repairing, teaching, learning, "
        "flying, rowing, lifting, stretching, waiting, celebrating, party, music, movies, "
        "watching, phone, texting, picnic, sunbathing, snowboarding, skateboarding, "
        "playing football, playing soccer, playing basketball, playing tennis, rock climbing, "
        "horseback riding, bird watching, volunteering, socializing, conversation, thinking",
    ),
    "damage": _values(
        "crack/cracks/cracked, scratch/scratches/scratched, dent/dents/dented, "
        "broken/break/shattered/breakage, rust/rusty/rusted/corrosion/corroded, "
        "tear/torn/rip/ripped, stain/stained/stains/discolored/discoloration, "
        "burn/burnt/burned/fire/scorched, hole/holes/puncture/punctured, "
        "water damage/wet/water/flood/leak/leaking/flooded/soaked/moisture",
        "bent, chipped, chip, chips, crushed, dirty, faded, missing, missing part, missing parts, "
        "mold, moldy, rot, rotten, peeling, worn, wear, frayed, warped, smashed, cut, "
        "collapsed, loose, bruise, bruised, wound, injury, bleeding, scuffed, scuff, split, "
        "crumbling, decay, decayed, erosion, fracture, fractured, fade, storm, wind, hail, "
        "collision, accident, minor, severe, major, none, total loss, structural, cosmetic, "
        "earthquake, smoke, impact, vandalism, frost, deformed, twisted, crumpled, blistered, "
        "abrasion, tarnished, fallen, destroyed, ruined, explosion, debris, insect, termite",
    ),
}
