// View: how elements and numbers are made. Texts become text nodes, and nothing else.

/** An element. Attributes that are null or false are left out; children are elements or texts. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);

const thousands = (value) => value.toLocaleString("en");

/** A probability with three digits that count: 0.534, 0.0213, 2.13e−7. */
function share(value) {
  if (!(value > 0)) return "0";
  return value < 1e-3 ? value.toExponential(2).replace("e-", "e−") : value.toPrecision(3);
}

/** A number of nats, or the word for one that is not known. */
const inNats = (value) => (Number.isNaN(value) ? "unknown" : `${value.toFixed(value < 10 ? 2 : 1)}`);

/** A temperature as short as it is exact. */
const degrees = (T) => String(Number(T.toPrecision(3)));

const isMark = /^[\p{M}\u200c\u200d]/u;

/** A token by itself: its white space shows, and a mark has something to stand on. */
function alone(text) {
  const standing = isMark.test(text) ? `\u25cc${text}` : text;
  return standing.replace(/ /g, "\u2423").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "⟨empty⟩";
}

/** Whether a text ends with something that is written out, on which no mark can stand. */
const endsWritten = (text) => text.endsWith("⟩");

const isWritten = /<[^<>\s]*>|⟨[^⟩]*⟩/g;
const isRightToLeft = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

/** The direction of tokens: that of their first letter, special tokens and what is written out left aside. */
function directionOf(texts) {
  const letter = texts.join("").replace(isWritten, "").match(/\p{L}/u);
  return letter && isRightToLeft.test(letter[0]) ? "rtl" : "ltr";
}

/** A token in running text: a line that it ends shows. */
const running = (text) => text.replace(/\n/g, "↵\n");
