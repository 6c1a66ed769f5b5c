"""Word lists for the text generator, all written for this project."""

# ruff: noqa: SIM905 (long lists are easier to read as text that is split)

from __future__ import annotations

NAMES_EN: list[str] = (
    "Ada Adam Alan Alex Alice Amir Amy Ana Anders Andrea Andy Anna Anton Ben Bella Beth "
    "Bill Bob Bruno Carl Carla Carmen Charlie Chloe Chris Clara Claire Dan Dana Daniel "
    "David Diana Diego Dora Dylan Ed Elena Eli Ella Elsa Emil Emily Emma Eric Erik Eva "
    "Eve Fatima Felix Fiona Frank Freya George Gina Grace Greta Gus Hana Hannah Harry "
    "Hassan Heidi Helen Henry Hugo Ian Ida Igor Ines Ingrid Iris Isaac Ivan Jack Jacob "
    "James Jan Jane Jasmine Jean Jenny Jim Joan Joe John Jonas Jose Julia Julie Kai "
    "Karen Karl Kate Kenji Kevin Kim Klara Lara Laura Lea Leo Lena Liam Lily Linda Lisa "
    "Liu Louis Lucas Lucy Luis Luna Maja Marco Maria Mark Marta Martin Mary Matt Max May "
    "Maya Mei Mia Michael Mike Mila Miles Mina Mohamed Mona Nadia Nancy Nate Nick Nina "
    "Noah Nora Nuno Oleg Olga Oliver Olivia Omar Oscar Otto Pablo Pam Paul Paula Pedro "
    "Peter Petra Phil Pia Priya Rachel Raj Ravi Ray Rita Rob Robin Rosa Rose Ruben Ruth "
    "Sakura Sam Samir Sandra Sara Sarah Scott Sean Simon Sofia Sonia Sophie Stella Steve "
    "Sue Susan Sven Tara Ted Theo Thomas Tim Tina Tom Toni Tony Uma Vera Victor Vik "
    "Vince Wanda Will Wendy Xavier Yara Yuki Yusuf Zack Zara Zoe Jean-Luc Mary-Ann"
).split()

NAME_SYLLABLES: list[str] = (
    "a be bo bri ca chi da de di do e el fa fi ga gre ha hi i ja jo ka ke ki la le li lo "
    "lu ma me mi mo na ne ni no o pa pe qui ra re ri ro sa se sha si so sta ta te ti to "
    "tri u va ve vi wa xi ya yu za ze zi zo zu"
).split()
NAME_ENDINGS: list[str] = (
    "n l r s th na la ra ia ro do lin bert mir ton vin x ck ster ie y us is os an en in on"
).split()

SURNAMES_ZH = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕"
GIVEN_ZH = (
    "明华伟芳娜敏静丽强磊军洋勇艳杰娟涛超秀霞平刚桂英兰玉萍红玲文建国志海峰雪梅晨宇轩浩然子涵欣怡"
    "思雨佳琪天乐一诺梦瑶博思远俊凯晓东春燕云飞龙小宝安心月星"
)
NICKNAMES_ZH: list[str] = (
    "小明 小红 小华 小丽 小刚 小龙 小雨 小月 小猫 小白 小黑 小美 小胖 小乐 小天 小雪 "
    "阿明 阿强 阿花 阿宝 老王 老李 老张 大伟 大山 豆豆 乐乐 圆圆 丁丁 明明 贝贝 欢欢 "
    "晶晶 妮妮"
).split()

# Words that are spelled, reversed and repeated; the story words below are added to them.
SPELLING_WORDS: list[str] = (
    "hello world apple banana orange lemon cherry grape melon peach bread butter cheese "
    "sugar salt water juice milk coffee tea table chair window door floor wall house "
    "garden kitchen school teacher student pencil paper book library letter number word "
    "sentence story music guitar piano drum song dance movie picture color red green "
    "blue yellow purple pink black white brown gray silver gold summer winter spring "
    "autumn morning evening night noon week month year today tomorrow sunday monday rain "
    "snow wind storm cloud sky star sun planet earth ocean river lake mountain valley "
    "forest desert island beach city village street bridge tower castle market shop "
    "money bank train plane bus car bicycle boat ship rocket engine wheel road map "
    "compass computer keyboard mouse screen server model token cache memory python code "
    "program robot science math physics history art sport football tennis chess game "
    "puzzle toy doll kite family mother father sister brother friend baby child woman "
    "man king queen prince knight doctor nurse farmer baker cook pilot sailor painter "
    "writer singer happy sad angry tired hungry thirsty brave kind clever funny quiet "
    "loud fast slow big small tall short long wide heavy light hot cold warm cool soft "
    "hard sweet sour fresh clean dirty young old new good bad one two three four five "
    "six seven eight nine ten hundred thousand run walk jump swim fly sing read write "
    "draw play work sleep dream eat drink cook wash open close give take make find lose "
    "win learn teach think know love help laugh smile cry talk listen look see hear "
    "touch smell taste stone iron glass wood cotton wool silk leather plastic metal "
    "diamond pepper onion carrot potato tomato garlic pasta pizza rice soup salad cake "
    "cookie candy chocolate honey jam egg bacon sausage spoon fork knife plate bowl "
    "bottle glove scarf coat shirt dress skirt shoe sock hat umbrella elephant giraffe "
    "crocodile butterfly spider snake strawberry pineapple watermelon blueberry broccoli "
    "cucumber mushroom pumpkin spaghetti hospital museum airport station theater "
    "restaurant university dictionary language question answer problem solution example "
    "exercise lesson alphabet vowel consonant syllable grammar beautiful wonderful "
    "important different interesting difficult dangerous necessary possible rhythm queue "
    "zebra quiz jazz oxygen galaxy eclipse comet meteor gravity energy magnet the be to "
    "of and in that have it for not on with he as you do at this but his by from they we "
    "say her she or an will my all would there their what so up out if about who get "
    "which go me when can like no just him into your some could them other than then now "
    "only come its over also back after use how our even want because any these us is "
    "are was were been has had did said each many where much before too same right still "
    "such here why ask men try need house again home hand place never last let might "
    "seem together under always near old bridge edge hill behind sound lamp secret path "
    "bread share idea moon found met done answer meet brave wish lost everyone nobody "
    "nothing something someone nice thank welcome please sorry goodbye morning favourite "
    "colour neighbour necessary accommodate separate definitely embarrass weird "
    "knowledge receive believe january february march april june july august september "
    "october november december tuesday wednesday thursday friday saturday london paris "
    "tokyo berlin china france english chinese stressed level racecar drawer lager"
).split()

# Creatures and things that can be a story's hero: English, Chinese, emoji.
HEROES: list[tuple[str, str, str]] = [
    ("cat", "猫", "🐱"),
    ("dog", "狗", "🐶"),
    ("rabbit", "兔子", "🐰"),
    ("fox", "狐狸", "🦊"),
    ("bear", "熊", "🐻"),
    ("panda", "熊猫", "🐼"),
    ("mouse", "老鼠", "🐭"),
    ("lion", "狮子", "🦁"),
    ("tiger", "老虎", "🐯"),
    ("horse", "马", "🐴"),
    ("cow", "牛", "🐮"),
    ("pig", "猪", "🐷"),
    ("frog", "青蛙", "🐸"),
    ("monkey", "猴子", "🐵"),
    ("chicken", "鸡", "🐔"),
    ("duck", "鸭子", "🦆"),
    ("owl", "猫头鹰", "🦉"),
    ("penguin", "企鹅", "🐧"),
    ("bird", "小鸟", "🐦"),
    ("fish", "鱼", "🐟"),
    ("whale", "鲸鱼", "🐳"),
    ("dolphin", "海豚", "🐬"),
    ("turtle", "乌龟", "🐢"),
    ("snail", "蜗牛", "🐌"),
    ("bee", "蜜蜂", "🐝"),
    ("ant", "蚂蚁", "🐜"),
    ("butterfly", "蝴蝶", "🦋"),
    ("elephant", "大象", "🐘"),
    ("giraffe", "长颈鹿", "🦒"),
    ("hedgehog", "刺猬", "🦔"),
    ("squirrel", "松鼠", "🐿️"),
    ("wolf", "狼", "🐺"),
    ("sheep", "羊", "🐑"),
    ("crab", "螃蟹", "🦀"),
    ("octopus", "章鱼", "🐙"),
    ("dinosaur", "恐龙", "🦕"),
    ("dragon", "龙", "🐉"),
    ("unicorn", "独角兽", "🦄"),
    ("robot", "机器人", "🤖"),
    ("ghost", "幽灵", "👻"),
    ("pirate", "海盗", "🏴‍☠️"),
    ("king", "国王", "👑"),
    ("princess", "公主", "👸"),
    ("wizard", "巫师", "🧙"),
    ("astronaut", "宇航员", "👩‍🚀"),
    ("cook", "厨师", "👨‍🍳"),
    ("farmer", "农夫", "👩‍🌾"),
    ("painter", "画家", "👩‍🎨"),
    ("teacher", "老师", "👩‍🏫"),
    ("doctor", "医生", "👨‍⚕️"),
    ("family", "家庭", "👨‍👩‍👧‍👦"),
    ("boy", "男孩", "👦"),
    ("girl", "女孩", "👧"),
    ("train", "火车", "🚂"),
    ("boat", "小船", "⛵"),
    ("car", "汽车", "🚗"),
    ("rocket", "火箭", "🚀"),
    ("balloon", "气球", "🎈"),
    ("clock", "时钟", "🕰️"),
    ("lamp", "台灯", "💡"),
    ("book", "书", "📖"),
    ("pencil", "铅笔", "✏️"),
    ("umbrella", "雨伞", "☂️"),
    ("piano", "钢琴", "🎹"),
    ("apple", "苹果", "🍎"),
    ("cake", "蛋糕", "🎂"),
    ("teapot", "茶壶", "🫖"),
    ("tree", "树", "🌳"),
    ("flower", "花", "🌸"),
    ("mushroom", "蘑菇", "🍄"),
    ("snowman", "雪人", "⛄"),
    ("star", "星星", "⭐"),
    ("cloud", "云", "☁️"),
    ("moon", "月亮", "🌙"),
    ("sun", "太阳", "☀️"),
    ("computer", "电脑", "💻"),
    ("kite", "风筝", "🪁"),
    ("bicycle", "自行车", "🚲"),
]

# Places a story can be about: English with article, Chinese, emoji.
PLACES: list[tuple[str, str, str]] = [
    ("the sea", "大海", "🌊"),
    ("the forest", "森林", "🌲"),
    ("the mountains", "高山", "⛰️"),
    ("the desert", "沙漠", "🏜️"),
    ("the city", "城市", "🏙️"),
    ("the village", "村庄", "🏡"),
    ("the castle", "城堡", "🏰"),
    ("the island", "小岛", "🏝️"),
    ("the river", "河流", "🏞️"),
    ("the lake", "湖", "🛶"),
    ("the farm", "农场", "🚜"),
    ("the school", "学校", "🏫"),
    ("the library", "图书馆", "📚"),
    ("the market", "市场", "🛒"),
    ("the zoo", "动物园", "🦓"),
    ("the park", "公园", "🌷"),
    ("the garden", "花园", "🌻"),
    ("the kitchen", "厨房", "🍳"),
    ("the jungle", "丛林", "🌴"),
    ("the beach", "海滩", "🏖️"),
    ("space", "太空", "🪐"),
    ("London", "伦敦", "🇬🇧"),
    ("Paris", "巴黎", "🇫🇷"),
    ("Beijing", "北京", "🇨🇳"),
    ("Tokyo", "东京", "🇯🇵"),
    ("Berlin", "柏林", "🇩🇪"),
    ("Rome", "罗马", "🇮🇹"),
    ("New York", "纽约", "🗽"),
    ("Shanghai", "上海", "🌃"),
    ("Africa", "非洲", "🌍"),
]

EMOJI: list[str] = (
    "😀 😃 😄 😁 😅 😂 🤣 😊 😇 🙂 😉 😍 🥰 😘 😜 🤔 😎 🤩 🥳 😢 😭 😡 😱 😴 🤗 🤖 👻 👽 "
    "💩 🙈 ❤️ 💙 💚 💛 💜 🖤 💔 ✨ ⭐ 🌟 🔥 💧 🌈 ☀️ 🌙 ⛄ ⚡ 🎉 🎂 🎁 🎈 🏆 ⚽ 🏀 🎸 🎹 "
    "🎨 📚 ✏️ 💻 📱 🍎 🍌 🍉 🍓 🍕 🍔 🍜 🍣 🍰 ☕ 🍵 🚗 🚂 ✈️ 🚀 ⛵ 🏠 🏰 🗻 🌊 🌲 🌵 🌸 "
    "🌻 🍀 👍 👎 👏 🙏 💪 ✌️ 👀 ✅ ❌ ❓ ❗ 💯 🆗"
).split()

# Emoji made of several code points: joined persons, skin tones, flags, keycaps.
JOINED_EMOJI: list[str] = (
    "👨‍👩‍👧 👨‍👩‍👧‍👦 👩‍👩‍👦 👨‍👨‍👧 👩‍👧‍👦 👨‍👦 👩‍❤️‍👨 👩‍💻 👨‍💻 🧑‍💻 "
    "👩‍🚀 👨‍🚀 👩‍🔬 👨‍🍳 👩‍🎨 👩‍🏫 👨‍⚕️ 👩‍🌾 🧑‍🚒 🕵️‍♂️ 🏃‍♀️ 🚴‍♂️ 🏊‍♀️ 🧘‍♀️ "
    "🤷‍♂️ 🤦‍♀️ 🐻‍❄️ 🐕‍🦺 🏴‍☠️ 🏳️‍🌈 ❤️‍🔥 👁️‍🗨️ 👍🏻 👍🏽 👍🏿 👋🏼 👋🏾 🙏🏽 💪🏻 "
    "💪🏿 👏🏾 ✊🏿 👩🏽‍💻 👨🏿‍🚀 👧🏻 👦🏾 🇨🇳 🇯🇵 🇰🇷 🇫🇷 🇩🇪 🇬🇧 🇺🇸 🇮🇹 🇪🇸 🇧🇷 🇮🇳 🇨🇦 🇪🇺 🇺🇦 "
    "🇲🇽 1️⃣ 2️⃣ 3️⃣ #️⃣"
).split()

SKIN_TONES: list[str] = ["", "\U0001f3fb", "\U0001f3fc", "\U0001f3fd", "\U0001f3fe", "\U0001f3ff"]
TONED_EMOJI: list[str] = ("👋 👍 👎 👏 🙌 🙏 💪 ✊ 👌 👈 👉 👧 👦 👩 👨 🧑 👶 🤝").split()

DAYS_EN: list[str] = ("Monday Tuesday Wednesday Thursday Friday Saturday Sunday").split()
DAYS_ZH: list[str] = list("一二三四五六日")
MONTHS_EN: list[str] = ("January February March April May June July August September October November December").split()
MONTHS_ZH: list[str] = ("一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月").split()

NUMBER_WORDS: list[str] = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen twenty"
).split()

# Things strangers ask about that the model knows nothing of.
SUBJECTS_EN: list[str] = (
    "gravity|black holes|quantum physics|the weather|the stock market|python|"
    "the internet|DNA|photosynthesis|the Roman Empire|World War II|machine learning|"
    "the economy|climate change|France|Germany|China|Japan|Brazil|Africa|"
    "the United States|the president|the moon landing|football|chess|basketball|"
    "the Olympics|music|jazz|Mozart|Shakespeare|philosophy|religion|love|"
    "the meaning of life|health|vitamins|cooking|pizza|bread|sushi|coffee|tea|wine|"
    "gardening|cars|airplanes|trains|ships|computers|GPUs|Linux|JavaScript|Rust|"
    "databases|HTTP|JSON|regex|git|Docker|the speed of light|electricity|magnets|atoms|"
    "water|fire|the ocean|volcanoes|dinosaurs|the universe|stars|time travel|money|taxes|"
    "bitcoin|history|geography|biology|chemistry|maths|calculus|prime numbers|"
    "square roots|poems|movies|Star Wars|video games|the news|elections|vaccines|sleep|"
    "dreams|exercise|yoga|fashion|my homework|my computer|my job|my boss|my dog"
).split("|")
SUBJECTS_ZH: list[str] = (
    "重力 黑洞 量子力学 天气 股票 编程 互联网 基因 光合作用 罗马帝国 历史 机器学习 经济 "
    "气候变化 法国 德国 美国 日本 总统 足球 篮球 奥运会 音乐 哲学 爱情 人生的意义 健康 "
    "做饭 比萨 面包 咖啡 茶 汽车 飞机 电脑 显卡 数据库 光速 电 原子 火山 宇宙 时间旅行 "
    "钱 比特币 地理 生物 化学 数学 微积分 质数 诗 电影 游戏 新闻 睡眠 梦 运动 我的作业 "
    "我的电脑 我的工作 唐诗 三国演义 长城 高考 人工智能"
).split()
