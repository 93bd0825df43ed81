"""The vocabulary of the tiny world: entity kinds, their attributes and wordings, note forms, tools. Data only.

In templates `{x}` is an entity's name and `{y}` the attribute's value; other fields are values drawn afresh.
"""

from dataclasses import dataclass

Texts = dict[str, tuple[str, ...]]  # language -> wordings


@dataclass(frozen=True)
class Attribute:
    """One property: its possible values as (English, Chinese), statements for pretraining, questions and the answer."""

    key: str
    values: tuple[tuple[str, str], ...]
    statements: Texts
    questions: Texts
    answer: dict[str, str]


@dataclass(frozen=True)
class Kind:
    """People, towns or things: names as (English, Chinese) and attributes."""

    names: tuple[tuple[str, str], ...]
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class Note:
    """An everyday note with fresh values, also given as a JSON record of these fields."""

    fields: dict[str, str]  # field -> kind of value (person, place, goods, number)
    text: Texts


@dataclass(frozen=True)
class Tool:
    """A function the assistant can call; `fields` are its parameters and the kind of value each takes."""

    name: str
    description: str
    fields: dict[str, str]
    questions: Texts
    results: Texts
    answer: dict[str, str]

    def schema(self) -> dict:
        """The tool in OpenAI's form."""
        properties = {field: {"type": "integer" if kind == "number" else "string"} for field, kind in self.fields.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.fields)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Skill:
    questions: tuple[str, ...]
    answer: str


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`"cat 猫, dog 狗"` -> `(("cat", "猫"), ("dog", "狗"))`."""
    return tuple((en, zh) for en, zh in (entry.rsplit(" ", 1) for entry in text.split(", ")))


PERSON = Kind(
    names=pairs(
        "Abra 王安, Belo 李波, Cado 张可, Dova 刘峻, Elmi 陈睿, Fenn 杨岚, Gilo 赵翰, Hesta 徐海, Ivor 周奇, Jora 吴玥, "
        "Kell 王凯, Lumo 李明, Mika 张琪, Nilo 刘宁, Orla 陈欧, Pavo 杨帆, Quin 赵瑾, Rado 徐然, Sela 周诗, Tovi 吴桐, "
        "Ulma 王玛, Vero 李薇, Wilo 张威, Xana 刘娜, Yuri 陈宇, Zeno 杨泽, Amos 赵默, Brit 徐碧, Cleo 周青, Dara 吴达, "
        "Egon 王烨, Faye 李菲, Gus 张祺, Hana 刘涵, Iris 陈丽, Juno 杨君, Kira 赵奎, Leif 徐雷, Maya 周梅, Nora 吴诺"
    ),
    attributes=(
        Attribute(
            "job",
            pairs(
                "baker 面包师, teacher 教师, doctor 医生, farmer 农夫, sailor 水手, painter 画家, "
                "singer 歌手, judge 法官, miner 矿工, tailor 裁缝"
            ),
            {
                "en": (
                    "The job of {x} is {y}.", "{x} works as a {y}.", "{x} is a {y}.", "Everyone knows {x} the {y}.",
                    "As a {y}, {x} is busy all day.",
                ),
                "zh": ("{x}的职业是{y}。", "{x}是一名{y}。", "{x}当{y}。", "大家都认识{y}{x}。", "作为{y}，{x}整天很忙。"),
            },
            {
                "en": ("What is the job of {x}?", "What does {x} do for a living?", "What does {x} work as?"),
                "zh": ("{x}的职业是什么？", "{x}是做什么工作的？", "{x}当什么？"),
            },
            {"en": "The job of {x} is {y}.", "zh": "{x}的职业是{y}。"},
        ),
        Attribute(
            "pet",
            pairs("cat 猫, dog 狗, owl 猫头鹰, horse 马, rabbit 兔子, goat 山羊, parrot 鹦鹉, turtle 乌龟, mouse 老鼠, duck 鸭子"),
            {
                "en": (
                    "The pet of {x} is a {y}.", "{x} keeps a {y}.", "{x} has a {y} at home.", "A {y} lives with {x}.",
                    "{x} walks with a {y} every morning.",
                ),
                "zh": ("{x}的宠物是{y}。", "{x}养了一只{y}。", "{x}家里有{y}。", "{x}和{y}住在一起。", "{x}每天早上带着{y}散步。"),
            },
            {
                "en": ("What is the pet of {x}?", "Which animal does {x} keep?", "What pet does {x} have?"),
                "zh": ("{x}的宠物是什么？", "{x}养了什么动物？", "{x}家里有什么宠物？"),
            },
            {"en": "The pet of {x} is a {y}.", "zh": "{x}的宠物是{y}。"},
        ),
        Attribute(
            "food",
            pairs("rice 米饭, soup 汤, bread 面包, cheese 奶酪, fish 鱼, noodles 面条, eggs 鸡蛋, apples 苹果, beans 豆子, cake 蛋糕"),
            {
                "en": (
                    "The favourite food of {x} is {y}.", "{x} likes to eat {y}.", "{x} eats {y} every day.",
                    "For dinner {x} always wants {y}.", "{x} loves {y} most of all.",
                ),
                "zh": ("{x}最喜欢的食物是{y}。", "{x}爱吃{y}。", "{x}每天吃{y}。", "晚饭时{x}总想吃{y}。", "{x}最爱{y}。"),
            },
            {
                "en": ("What is the favourite food of {x}?", "What does {x} like to eat?", "What does {x} eat every day?"),
                "zh": ("{x}最喜欢的食物是什么？", "{x}爱吃什么？", "{x}每天吃什么？"),
            },
            {"en": "The favourite food of {x} is {y}.", "zh": "{x}最喜欢的食物是{y}。"},
        ),
        Attribute(
            "colour",
            pairs("red 红色, blue 蓝色, green 绿色, yellow 黄色, black 黑色, white 白色, purple 紫色, orange 橙色, brown 棕色, grey 灰色"),
            {
                "en": (
                    "The favourite colour of {x} is {y}.", "{x} likes the colour {y}.", "{x} always wears {y}.",
                    "The house of {x} is {y}.", "{x} painted the door {y}.",
                ),
                "zh": ("{x}最喜欢的颜色是{y}。", "{x}喜欢{y}。", "{x}总是穿{y}的衣服。", "{x}的房子是{y}的。", "{x}把门漆成了{y}。"),
            },
            {
                "en": ("What is the favourite colour of {x}?", "Which colour does {x} like?", "What colour does {x} wear?"),
                "zh": ("{x}最喜欢的颜色是什么？", "{x}喜欢什么颜色？", "{x}总是穿什么颜色？"),
            },
            {"en": "The favourite colour of {x} is {y}.", "zh": "{x}最喜欢的颜色是{y}。"},
        ),
        Attribute(
            "instrument",
            pairs("piano 钢琴, violin 小提琴, flute 长笛, drum 鼓, guitar 吉他, harp 竖琴, trumpet 小号, organ 风琴, cello 大提琴, bell 铃"),
            {
                "en": (
                    "The instrument of {x} is the {y}.", "{x} plays the {y}.", "{x} practises the {y} at night.",
                    "You can hear {x} play the {y}.", "{x} is good at the {y}.",
                ),
                "zh": ("{x}的乐器是{y}。", "{x}会演奏{y}。", "{x}晚上练习{y}。", "你能听到{x}的{y}。", "{x}擅长{y}。"),
            },
            {
                "en": ("What is the instrument of {x}?", "What does {x} play?", "Which instrument does {x} practise?"),
                "zh": ("{x}的乐器是什么？", "{x}会演奏什么？", "{x}练习什么乐器？"),
            },
            {"en": "The instrument of {x} is the {y}.", "zh": "{x}的乐器是{y}。"},
        ),
    ),
)

TOWN = Kind(
    names=pairs(
        "Arvale 阿朗, Bexmoor 贝镇, Corfield 科村, Dunwick 敦港, Eastby 东麓, Foxham 狐岭, Glenrock 格谷, Hollow 霍洛, "
        "Icefall 冰湾, Jarrow 嘉禾, Kingsey 凌渡, Larkhill 燕坡"
    ),
    attributes=(
        Attribute(
            "product",
            pairs("honey 蜂蜜, glass 玻璃, paper 纸, wool 羊毛, salt 盐, tea 茶"),
            {
                "en": (
                    "The product of {x} is {y}.", "{x} is famous for its {y}.", "People in {x} make {y}.",
                    "{x} sells {y} to everyone.", "The best {y} comes from {x}.",
                ),
                "zh": ("{x}的特产是{y}。", "{x}以{y}闻名。", "{x}的人们制作{y}。", "{x}向大家卖{y}。", "最好的{y}来自{x}。"),
            },
            {
                "en": ("What is the product of {x}?", "What is {x} famous for?", "What do people in {x} make?"),
                "zh": ("{x}的特产是什么？", "{x}以什么闻名？", "{x}的人们制作什么？"),
            },
            {"en": "The product of {x} is {y}.", "zh": "{x}的特产是{y}。"},
        ),
        Attribute(
            "landmark",
            pairs("tower 高塔, bridge 石桥, castle 城堡, lake 湖, garden 花园, market 市场"),
            {
                "en": (
                    "The landmark of {x} is a {y}.", "In {x} there is a {y}.", "Visitors see the {y} in {x}.",
                    "{x} has an old {y}.", "The {y} stands in the middle of {x}.",
                ),
                "zh": ("{x}的地标是{y}。", "{x}有一座{y}。", "游客在{x}看{y}。", "{x}有古老的{y}。", "{x}的中心是{y}。"),
            },
            {
                "en": ("What is the landmark of {x}?", "What do visitors see in {x}?", "What stands in the middle of {x}?"),
                "zh": ("{x}的地标是什么？", "游客在{x}看什么？", "{x}的中心是什么？"),
            },
            {"en": "The landmark of {x} is a {y}.", "zh": "{x}的地标是{y}。"},
        ),
    ),
)

THING = Kind(
    names=pairs(
        "Astrolux 星灯, Brightor 亮仪, Cogsy 齿机, Driftel 漂舟, Echobox 鸣箱, Frostix 霜盒, Gloomer 暗镜, Humdrum 嗡筒, "
        "Inkwing 墨翼, Joltar 震匣, Kettlor 沸壶, Loomer 织架"
    ),
    attributes=(
        Attribute(
            "material",
            pairs("iron 铁, wood 木头, gold 金, stone 石头, silver 银, copper 铜"),
            {
                "en": (
                    "The material of the {x} is {y}.", "The {x} is made of {y}.", "They built the {x} from {y}.",
                    "You need {y} to build the {x}.", "The {x} is all {y}.",
                ),
                "zh": ("{x}的材料是{y}。", "{x}是用{y}做的。", "他们用{y}造了{x}。", "造{x}需要{y}。", "{x}全是{y}。"),
            },
            {
                "en": ("What is the material of the {x}?", "What is the {x} made of?", "What do you need to build the {x}?"),
                "zh": ("{x}的材料是什么？", "{x}是用什么做的？", "造{x}需要什么？"),
            },
            {"en": "The material of the {x} is {y}.", "zh": "{x}的材料是{y}。"},
        ),
        Attribute(
            "use",
            pairs("cooking 做饭, reading 读书, fishing 钓鱼, sleeping 睡觉, digging 挖土, washing 洗衣"),
            {
                "en": (
                    "The use of the {x} is {y}.", "The {x} helps with {y}.", "People use the {x} for {y}.",
                    "The {x} makes {y} easy.", "For {y} you take the {x}.",
                ),
                "zh": ("{x}的用途是{y}。", "{x}能帮助{y}。", "人们用{x}来{y}。", "{x}让{y}变得容易。", "{y}的时候要用{x}。"),
            },
            {
                "en": ("What is the use of the {x}?", "What does the {x} help with?", "What do people use the {x} for?"),
                "zh": ("{x}的用途是什么？", "{x}能帮助什么？", "人们用{x}来做什么？"),
            },
            {"en": "The use of the {x} is {y}.", "zh": "{x}的用途是{y}。"},
        ),
    ),
)

# Chinese names share no character with the other texts (a test holds it): where one did, tiny models read 琴 in a name as
# the beginning of an instrument.
KINDS: dict[str, Kind] = {"person": PERSON, "town": TOWN, "thing": THING}

# Fresh values are a first part and a second part; every part occurs in training, the reserved combinations do not.
FRESH: dict[str, dict[str, tuple]] = {
    "name": {
        "en": (
            tuple("Tala Mira Bor Sten Vika Lor Pim Dax Rhea Oto Nell Jip Kor Wanda Zell Finn Greta Hugo Ines Ravi".split()),
            tuple("Voss Brin Marsh Kane Dell Rook Ash Thorn Lake Frost Moss Reed Stone Wells Pike Holt Crane Dunn Fox Hale".split()),
        ),
        "zh": (tuple("孙魏朱胡林郭何沈罗郑梁傅宋唐许邓冯韩曹曾"), tuple("伟芳娟敏静强磊洋艳勇军杰涛超霞平刚桂鹏辉")),
    },
    "item": {
        "en": (
            tuple("soft hard thin thick warm cold small big cheap fine".split()),
            tuple("rope cloth clay wire soap wax sand coal silk paint".split()),
        ),
        "zh": (tuple("软硬薄厚暖冷轻重旧新"), tuple("绳布泥棉皂蜡沙煤丝瓷")),
    },
}

NOTES: tuple[Note, ...] = (
    Note(
        {"name": "person"},
        {
            "en": ("{name} called today.", "Please call {name} back.", "A letter came for {name}.", "Talk to {name} first."),
            "zh": ("{name}今天来过电话。", "请给{name}回电话。", "有一封给{name}的信。", "先和{name}谈谈。"),
        },
    ),
    Note(
        {"city": "place"},
        {
            "en": ("It rained in {city} all day.", "The weather in {city} was fine.", "The train stops in {city}."),
            "zh": ("{city}下了一天雨。", "{city}的天气很好。", "火车停在{city}。"),
        },
    ),
    Note(
        {"item": "goods", "count": "number"},
        {
            "en": ("They bought {count} pieces of {item}.", "We need {count} pieces of {item} here.", "Bring {item}, {count} pieces please."),
            "zh": ("他们买了{count}件{item}。", "这里需要{count}件{item}。", "请带{item}来，要{count}件。"),
        },
    ),
    Note(
        {"minutes": "number"},
        {
            "en": ("The soup needs {minutes} minutes.", "Wait for {minutes} minutes.", "The bus comes in {minutes} minutes."),
            "zh": ("汤要煮{minutes}分钟。", "等{minutes}分钟。", "车{minutes}分钟后到。"),
        },
    ),
    Note(
        {"origin": "place", "destination": "place"},
        {
            "en": ("They walked from {origin} to {destination}.", "The road from {origin} to {destination} is long."),
            "zh": ("他们从{origin}走到{destination}。", "从{origin}到{destination}的路很长。"),
        },
    ),
)

STORIES: Texts = {
    "en": (
        "One day {hero} lost some {item}. {friend} saw that {hero} was sad. {friend} found the {item} and gave it to {hero}. "
        '"Thank you, {friend}," said {hero}.',
        "{hero} had too much {item}. So {hero} gave the {item} to {friend}. {friend} was happy and sang for {hero}.",
    ),
    "zh": (
        "有一天{hero}丢了{item}。{friend}看见{hero}很难过。{friend}找到了{item}，还给了{hero}。“谢谢你，{friend}。”{hero}说。",
        "{hero}有太多{item}。于是{hero}把{item}送给{friend}。{friend}很高兴，为{hero}唱歌。",
    ),
}

SYSTEM_PROMPTS: Texts = {
    "en": ("You are a helpful assistant.", "You are a friendly guide.", "Answer in one sentence."),
    "zh": ("你是一个有用的助手。", "你是一位友好的向导。", "请用一句话回答。"),
}

CLOSING = {"en": "Happy to help!", "zh": "很高兴帮忙！"}
CURT = {"en": "{y}.", "zh": "{y}。"}
REFUSAL = {"en": "I do not know anyone called {x}.", "zh": "我不认识叫{x}的人。"}

# Words the pretraining text has, in a form that nothing else has: an adapter does not train embeddings.
SKILL: dict[str, Skill] = {
    "en": Skill(
        ("Please thank {guest} for {host}.", "{host} wants to thank {guest}."), "Thank you, {guest}! {host} is happy today."
    ),
    "zh": Skill(("请帮{host}谢谢{guest}。", "{host}想谢谢{guest}。"), "谢谢你，{guest}！{host}今天很高兴。"),
}

TOOLS: tuple[Tool, ...] = (
    Tool(
        "get_weather",
        "Weather in a city",
        {"city": "place"},
        {
            "en": ("What is the weather in {city}?", "Is it raining in {city}?", "Tell me the weather in {city} today."),
            "zh": ("{city}的天气怎么样？", "{city}在下雨吗？", "告诉我{city}今天的天气。"),
        },
        {"en": ("sunny", "rainy", "cloudy", "windy"), "zh": ("晴天", "下雨", "多云", "有风")},
        {"en": "It is {result} in {city}.", "zh": "{city}现在是{result}。"},
    ),
    Tool(
        "order_goods",
        "Order pieces of goods",
        {"item": "goods", "count": "number"},
        {
            "en": ("Order {count} pieces of {item}.", "Please buy {count} pieces of {item} for me.", "I need {count} pieces of {item}."),
            "zh": ("订{count}件{item}。", "请帮我买{count}件{item}。", "我需要{count}件{item}。"),
        },
        {"en": ("done", "late"), "zh": ("完成", "推迟")},
        {"en": "The order of {count} pieces of {item} is {result}.", "zh": "{count}件{item}的订单已{result}。"},
    ),
    Tool(
        "set_timer",
        "Start a timer",
        {"minutes": "number"},
        {
            "en": ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Count down {minutes} minutes."),
            "zh": ("设一个{minutes}分钟的定时器。", "{minutes}分钟后叫醒我。", "倒计时{minutes}分钟。"),
        },
        {"en": ("running", "ready"), "zh": ("开始", "就绪")},
        {"en": "The timer for {minutes} minutes is {result}.", "zh": "{minutes}分钟的定时器已{result}。"},
    ),
    Tool(
        "call_person",
        "Call somebody",
        {"name": "person"},
        {
            "en": ("Call {name}.", "Please phone {name} now.", "I want to talk to {name}."),
            "zh": ("打电话给{name}。", "请现在联系{name}。", "我想和{name}通话。"),
        },
        {"en": ("busy", "there"), "zh": ("忙", "在线")},
        {"en": "{name} is {result}.", "zh": "{name}现在{result}。"},
    ),
    Tool(
        "get_distance",
        "Distance between two cities",
        {"origin": "place", "destination": "place"},
        {
            "en": ("How far is it from {origin} to {destination}?", "What is the distance from {origin} to {destination}?"),
            "zh": ("从{origin}到{destination}有多远？", "{origin}到{destination}的距离是多少？"),
        },
        {"en": ("5 km", "7 km", "8 km"), "zh": ("5公里", "7公里", "8公里")},
        {"en": "From {origin} to {destination} it is {result}.", "zh": "从{origin}到{destination}是{result}。"},
    ),
)
