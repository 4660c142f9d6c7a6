"""What is particular to a language: its stemmer, and the words that say nothing.

The stop words are articles, pronouns, prepositions, conjunctions, auxiliary verbs and the like,
in lower case, spelt as people write them. A word that also names a thing (German "Sein", French
"été", Spanish "sobre" the envelope) is listed only where the empty use is by far the commoner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from server.preferences import Language


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How the words of a language are told apart."""

    stemmer: str | None = None
    """Name of the Snowball stemmer; None: words stay as they are."""
    stop_words: frozenset[str] = frozenset()
    """Words that say nothing, in lower case with ' for the apostrophe."""
    elisions: frozenset[str] = frozenset()
    """What stands before an apostrophe and says nothing, such as the l of l'acqua."""


_ENGLISH: Final = """
    a about above after again against all am an and any are as at be because been before being
    below between both but by can could did do does doing down during each few for from further
    had has have having he her here hers herself him himself his how i if in into is it its
    itself just me more most my myself no nor not now of off on once only or other our ours
    ourselves out over own same she should so some such than that the their theirs them
    themselves then there these they this those through to too under until up very was we were
    what when where which while who whom why will with would you your yours yourself yourselves
    i'm i've i'd i'll don't didn't doesn't isn't wasn't can't you're we're they're
    let won't couldn't wouldn't shouldn't
"""
_GERMAN: Final = """
    aber alle alles als also am an auch auf aus bei beim bin bis bist da damit dann das dass
    dein deine dem den denn der des dich die dies diese diesem diesen dieser dieses dir doch du
    durch ein eine einem einen einer eines er es etwas euch euer eure für gegen habe haben hast
    hat hatte hatten hier ich ihm ihn ihnen ihr ihre ihren ihrer im in ist ja jede jeder jetzt
    kann kein keine keinen keiner könnte man mein meine meinen meiner mich mir mit muss nach
    nicht nichts noch nur ob oder ohne schon sehr sein seine seinen seiner seit sich sie sind
    so sollte über um und uns unser unsere unseren unserer unter vom von vor wann war waren
    warum was wegen weil welche welcher welches wem wen wenn wer werden wie wieder will wir
    wird wo wurde würde wurden zu zum zur zwischen
"""
_FRENCH: Final = """
    a à ai aie as au aucun aucune aussi autre aux avaient avait avant avec avez avoir avons ça
    car ce ceci cela celle celles celui ces cet cette ceux chez comme comment dans de depuis
    des donc dont du elle elles en encore entre es est et étaient était être eu eux ici il ils
    je la là le les leur leurs lui ma mais me même mêmes mes moi mon ne ni non nos notre nous
    on ont ou où par parce pas pendant peu peut plus pour pourquoi puis quand que quel quelle
    quels qui quoi sa sans se sera serait ses si soi soit sommes son sont sous suis sur ta te
    tes toi ton toujours tous tout toute toutes très tu un une va vos votre vous y
"""
_SPANISH: Final = """
    a al algo alguna algunas alguno algunos antes aquel aquella aquellos aquí así aún aunque
    cada como cómo con cual cuál cuales cuando cuándo de del desde donde dónde e el él ella
    ellas ellos en entonces entre era eran eres es esa esas ese eso esos esta está estaba
    estaban están estar estas este esto estos estoy fue fueron fui ha haber había habían han
    has hasta hay he la las le les lo los más me mi mí mis mucho muy nada ni ningún ninguna no
    nos nosotros nuestra nuestras nuestro nuestros o os otra otras otro otros para pero poco
    por porque pues que qué quien quién quienes se ser si sí sido sin sobre somos son soy su
    sus también tan tanto te tengo tenía ti tiene tienen todo todos tu tú tus un una unas uno
    unos ya yo
"""
_ITALIAN: Final = """
    a ad agli ai al alla alle allo altra altro anche avere avete aveva che chi ci ciò col come
    con contro cosi così cui da dagli dai dal dalla dalle dallo degli dei del della delle dello
    di dopo dove e è ed era erano ero essere fa fu gli ha hai hanno ho i il in io la là le lei
    li lì lo loro lui ma me mi mia mie miei mio molto ne né nei nel nella nelle nello noi non
    nostra nostri nostro o per perché però più poi quando quella quelle quelli quello questa
    queste questi questo qui quindi se sei sempre senza si sì sia siamo sono sta stato su sua
    sue sugli sui sul sulla sulle sullo suo suoi tra tu tua tuo tutta tutte tutti tutto un una
    uno vi voi vostro
"""
_PORTUGUESE: Final = """
    a à agora algo algum alguma antes ao aos aquela aquele aqui as às assim até cada com como
    contra da das de dela delas dele deles depois do dos e é ela elas ele eles em então entre
    era eram essa essas esse esses esta está estão estar estas estava este estes estou eu foi
    foram há havia isso isto já lá lhe mais mas me meu meus mim minha minhas muito na não nas
    nem no nos nós nossa nosso o onde os ou outra outras outro outros para pela pelas pelo
    pelos por porém porque quais qual quando quanto que quê quem são se seja sem ser seu seus
    sido só sobre somos sou sua suas também tão te tem têm ter tinha todo todos tu tudo um uma
    umas uns você
"""

_FRENCH_ELISIONS: Final = "c d j jusqu l lorsqu m n puisqu qu quoiqu s t"
_ITALIAN_ELISIONS: Final = "all c coll com d dall dell dov gl l m n nell quell quest s sull t un v"
_PORTUGUESE_ELISIONS: Final = "d"


def _vocabulary(stemmer: str, stop_words: str, elisions: str = "") -> Vocabulary:
    return Vocabulary(stemmer, frozenset(stop_words.split()), frozenset(elisions.split()))


VOCABULARIES: Final[Mapping[Language, Vocabulary]] = {
    Language.SIMPLE: Vocabulary(),
    Language.ENGLISH: _vocabulary("english", _ENGLISH),
    Language.GERMAN: _vocabulary("german", _GERMAN),
    Language.FRENCH: _vocabulary("french", _FRENCH, _FRENCH_ELISIONS),
    Language.SPANISH: _vocabulary("spanish", _SPANISH),
    Language.ITALIAN: _vocabulary("italian", _ITALIAN, _ITALIAN_ELISIONS),
    Language.PORTUGUESE: _vocabulary("portuguese", _PORTUGUESE, _PORTUGUESE_ELISIONS),
}
"""The vocabulary of every language that a user can choose."""
