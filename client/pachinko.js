/**
 * Pachinko's client for browsers, and for Node from 22 on: one WebSocket that comes back by itself.
 *
 *     const client = connect("/ws/lobby", { storage: sessionStorage });
 *     client.on("said", ({ who, text }) => show(who, text));
 *     client.answer("confirm", ({ text }) => confirm(text));
 *     client.send("typing");
 *     const total = await client.request("sum", { a: 1, b: 2 });
 *     for await (const n of client.stream("count", { to: 3 })) show(n);
 *
 * Groups that the server keeps go on where they were: what was missed comes, or a `gap` says that
 * it cannot. Importing this module does nothing.
 */

/**
 * @typedef {"connecting" | "open" | "waiting" | "closed"} State
 * @typedef {{ type: string, id?: string | number, payload?: any, group?: string, at?: string,
 *   more?: boolean }} Message
 * @typedef {{ code: number, reason: string, wait?: number }} Detail
 * @typedef {{ id: number, type: string, sent: boolean, at?: string | null, taken?: string | null,
 *   isPlain?: boolean, stop?: Sending, item?: (payload: any, at?: string) => void,
 *   done: (payload?: any) => void, fail: (error: unknown) => void, over?: () => void }} Call
 * @typedef {{ id?: number, sent: boolean }} Sending
 * @typedef {Pick<Storage, "getItem" | "setItem">} Store
 * @typedef {string | null | undefined} Token
 * @typedef {{ token?: Token | (() => Token | Promise<Token>), storage?: Store,
 *   resume?: boolean | Record<string, string>, protocols?: string | string[] }} Options
 */

// Times are in milliseconds.
const SHORTEST = 500; // the shortest wait before another attempt
const BUSY = 5_000; // the same where the server asks for patience: it restarts, or is overloaded
const LONGEST = 20_000;
const STEADY = 5_000; // A connection that lasted so long starts the waits anew.
const ATTEMPT = 20_000; // for the token, the handshake and the answer to `authenticate`
const SILENCE = 30_000; // without a message, after which the server is asked whether it is there
const PROBE = 5_000; // for its answer; the server gives it at once, also while a handler runs
const MOST_WAITING = 100; // messages in the outbox
const MOST_BYTES = 1_048_576; // in the outbox, or in the browser's own buffer
const MOST_IDS = 16; // The server reads no more.
const MOST_GROUPS = 1_000; // whose positions are kept: as many as the server lets one client join
const MOST_URL = 2_000; // characters of a position in the address; more goes in a message
const MOST_TIMER = 2 ** 31; // Timers take a longer time for none at all.

/** An error that the server has answered with: `code` is stable, `message` is for developers. */
export class MessageError extends Error {
  /** @param {string} code @param {string} [message] @param {object} [details] */
  constructor(code, message, details = {}) {
    super(message || code);
    this.name = "MessageError";
    this.code = code;
    this.details = details;
  }
}

/** There is no answer, and there will be none. If `sent`, the server may have done its work. */
export class Lost extends Error {
  /** @param {boolean} sent @param {string} why @param {string} [name] */
  constructor(sent, why, name = "Lost") {
    super(why);
    this.name = name;
    this.sent = sent;
  }
}

/**
 * Connect, and stay connected. Returns at once; what is sent meanwhile waits in the outbox. Throws
 * `TypeError` if this is not the address of a WebSocket.
 *
 * @param {string | URL} url of the endpoint; relative to the page, `http:` or `ws:`
 * @param {Options} [options]
 */
export function connect(url, options) {
  return new Client(url, options);
}

/** The items of a stream. Leaving the loop, or `return()`, stops the stream on the server. */
class Items {
  /** @type {[any, string | undefined][]} */
  #waiting = [];
  /** @type {unknown} */
  #error;
  #isOver = false;
  /** @type {((_?: undefined) => void)[]} */
  #sleepers = []; // calls of `next` that wait
  /** @type {string | undefined} */
  #last;
  #call;
  #took;
  #leave;

  /** @param {Call} call @param {() => void} took @param {() => void} leave */
  constructor(call, took, leave) {
    this.#call = call;
    this.#took = took;
    this.#leave = leave;
    call.item = (payload, at) => {
      this.#waiting.push([payload, at]);
      this.#wake();
    };
    call.done = () => this.#end();
    call.fail = (error) => this.#end(error);
  }

  #wake() {
    for (const wake of this.#sleepers.splice(0)) wake();
  }

  /** @param {unknown} [error] */
  #end(error) {
    this.#error = error;
    this.#isOver = true;
    this.#call.over?.();
    this.#wake();
  }

  /** @returns {Promise<IteratorResult<any, undefined>>} */
  async next() {
    // Whoever asks for the next item is done with the last one: it need not come again.
    this.#call.taken = this.#last ?? this.#call.taken;
    this.#took();
    while (!this.#waiting.length) {
      if (this.#isOver) {
        const error = this.#error;
        this.#error = undefined;
        if (error) throw error;
        return { value: undefined, done: true };
      }
      await new Promise((wake) => this.#sleepers.push(wake));
    }
    const [value, at] = /** @type {[any, string | undefined]} */ (this.#waiting.shift());
    this.#last = at;
    return { value, done: false };
  }

  /** Stop the stream, at once: a `next()` that waits is over, too. */
  async return() {
    this.#waiting = [];
    this.#error = undefined;
    if (!this.#isOver) {
      this.#leave();
      this.#end();
    }
    return { value: undefined, done: true };
  }

  [Symbol.asyncIterator]() {
    return this;
  }
}

class Client {
  #address;
  #key;
  #options;
  /** @type {State} */
  #state = "connecting";
  /** @type {WebSocket | null} */
  #socket = null;
  #attempt = 0; // counts them, so that one which was given up can tell
  #failures = 0; // in a row
  #openedAt = Infinity;
  #isRenewed = false; // A fresh token has been tried.
  #isProbing = false;
  #isWanted = false; // Somebody is here who should not wait.
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer; // for the next attempt, the end of this one, or the silence of the server
  #over = new AbortController();

  #lastId = 0;
  /** @type {Map<unknown, Call>} */
  #calls = new Map(); // what waits for an answer, by id
  /** @type {{ text: string, size: number, call?: Sending }[]} */
  #outbox = [];
  /** @type {Map<string, Set<Function>>} */
  #listeners = new Map();
  /** @type {Map<string, Function>} */
  #answerers = new Map();

  /** @type {Map<string, string>} */
  #groups = new Map(); // the position in each kept group, the latest last
  /** @type {string[]} */
  #ids = []; // what this client's connections were called
  /** @type {{ id: number, type: string, at: string | null }[]} */
  #unfinished = []; // the streams of the page before a reload

  /** @param {string | URL} url @param {Options} [options] */
  constructor(url, options = {}) {
    this.#address = new URL(url, globalThis.location?.href);
    this.#address.protocol = this.#address.protocol.replace("http", "ws");
    const { protocol } = this.#address;
    if (!/^wss?:$/.test(protocol)) throw new TypeError(`no address of a WebSocket: ${url}`);
    this.#address.hash = "";
    this.#key = `pachinko ${this.#address}`;
    this.#options = options;
    this.#load();
    this.#watch();
    this.#open();
  }

  /** Where the connection is: `connecting`, `open`, `waiting` for the next attempt, or `closed`. */
  get state() {
    return this.#state;
  }

  /**
   * Send a message that needs no answer. Throws `Lost` if the client is closed or the outbox full.
   *
   * @param {string} type @param {any} [payload]
   */
  send(type, payload) {
    this.#post({ type, payload });
  }

  /**
   * Send a message, and return the payload of its answer. Rejects with `MessageError` for an error,
   * with `Lost` if the connection ends or `timeout` ms have passed, or with the signal's reason.
   *
   * @param {string} type @param {any} [payload]
   * @param {{ timeout?: number, signal?: AbortSignal }} [options]
   * @returns {Promise<any>}
   */
  async request(type, payload, { timeout, signal } = {}) {
    signal?.throwIfAborted();
    const call = this.#call(type);
    let timer, abort = () => {};
    try {
      return await new Promise((done, fail) => {
        Object.assign(call, { done, fail, isPlain: true });
        abort = () => fail(signal?.reason);
        signal?.addEventListener("abort", abort);
        const late = () => fail(new Lost(call.sent, `no answer in ${timeout} ms`, "TimeoutError"));
        if ((timeout ?? Infinity) < MOST_TIMER) timer = setTimeout(late, timeout);
        this.#post({ type, id: call.id, payload }, call);
      });
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", abort);
      this.#withdraw(call);
    }
  }

  /**
   * Start a stream, and return its items. Leaving the loop stops it, and so does the signal. Throws
   * `Lost` as `send` does.
   *
   * @param {string} type @param {any} [payload] @param {{ signal?: AbortSignal }} [options]
   */
  stream(type, payload, { signal } = {}) {
    signal?.throwIfAborted();
    const call = this.#call(type), items = this.#items(call), stop = () => items.return();
    try {
      this.#post({ type, id: call.id, payload }, call);
    } catch (error) {
      this.#withdraw(call);
      throw error;
    }
    signal?.addEventListener("abort", stop);
    call.over = () => signal?.removeEventListener("abort", stop);
    return items;
  }

  /**
   * Return the items of a stream that the page before a reload has not finished, from where it was;
   * undefined if there is none. Call it before the connection is open, that is right after
   * `connect`: the server ends what nobody asks for.
   *
   * @param {string} type
   */
  resumed(type) {
    const index = this.#unfinished.findIndex((each) => each.type === type);
    if (index < 0) return undefined;
    const [{ id, at }] = this.#unfinished.splice(index, 1);
    return this.#items(Object.assign(this.#call(type, id), { at, taken: at, sent: true }));
  }

  /**
   * Call `f(payload, message)` with each message of a type, and return what ends that. `$state`
   * stands for changes of the state: `f(state, detail)`.
   *
   * @param {string} type @param {Function} f
   */
  on(type, f) {
    const all = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, all.add(f));
    return () => void all.delete(f);
  }

  /**
   * Answer each question of a type with what `f(payload)` returns, or resolves to. A `MessageError`
   * that it throws is the answer, too.
   *
   * @param {string} type @param {Function} f
   */
  answer(type, f) {
    this.#answerers.set(type, f);
  }

  /** Try now, if the next attempt waits; if the connection is open, see whether it still lives. */
  retry() {
    if (this.#state === "waiting") this.#open();
    if (this.#state !== "open") return;
    this.#isWanted = true;
    if (!this.#isProbing) this.#probe(); // else many calls would put off its end
  }

  /** Close for good. What waits for an answer rejects with `Lost`. */
  close(code = 1000, reason = "") {
    if (this.#state === "closed") return;
    if (this.#socket?.readyState === 1) this.#socket.close(code, reason);
    this.#finish(code, reason);
  }

  // ── the connection ───────────────────────────────────────────────────────────────────────────

  #watch() {
    const options = { signal: this.#over.signal }, { document } = globalThis;
    const wake = () => this.retry();
    globalThis.addEventListener?.("online", () => {
      if (this.#state !== "connecting") return wake();
      this.#isWanted = true; // The attempt is from before, and may hang.
      this.#drop(1006, "the network is back");
    }, options);
    document?.addEventListener("resume", wake, options); // after a freeze
    document?.addEventListener("visibilitychange", () => {
      this.#save(); // A page that is hidden may be killed without a word.
      if (!document.hidden) wake();
    }, options);
  }

  async #open() {
    const attempt = ++this.#attempt, { token: source, protocols = [] } = this.#options;
    this.#after(ATTEMPT, () => this.#drop(1006, "no connection in time"));
    this.#become("connecting");
    try {
      const token = await (typeof source === "function" ? source() : source);
      if (attempt !== this.#attempt) return;
      const names = [protocols].flat(), bearer = names.indexOf("bearer");
      const isFirst = token != null && bearer < 0; // The token goes into the first message.
      if (token != null && !isFirst) names.splice(bearer + 1, 0, token);
      const isTold = this.#announce(isFirst);
      this.#listen(new WebSocket(this.#address, names), () =>
        isFirst ? this.#authenticate(token) : this.#begin(isTold ? undefined : this.#resume()));
    } catch (error) {
      if (attempt === this.#attempt) this.#drop(1006, String(error));
    }
  }

  /** @param {WebSocket} socket @param {() => void} opened */
  #listen(socket, opened) {
    this.#socket = socket;
    socket.onopen = () => {
      socket.onerror = null; // A `close` with the code is to come.
      opened();
    };
    socket.onmessage = ({ data }) => {
      try {
        if (typeof data === "string") this.#receive(JSON.parse(data));
      } catch (error) {
        report(error); // It is no message. In Node an error from here would end the process.
      }
    };
    socket.onclose = ({ code, reason }) => this.#drop(code, reason);
    socket.onerror = () => this.#drop(1006); // Node 22 says no more of an attempt that has failed.
  }

  /** @param {string} token */
  #authenticate(token) {
    const call = this.#call("authenticate"), resume = this.#resume();
    // What waits in the outbox is sent once the server knows us: nothing is lost if it does not.
    call.done = () => this.#begin();
    call.fail = (error) => {
      if (!(error instanceof MessageError)) return;
      // A server that knows no tokens has not read the rest either. Others may take it later.
      if (error.code === "unknown_type") this.#begin(resume);
      else this.#drop(3500, error.message);
    };
    call.sent = call.isPlain = true;
    this.#write({ type: "authenticate", id: call.id, payload: { token, resume } });
  }

  /** @param {object} [resume] what is still to be told */
  #begin(resume) {
    if (resume) this.#write({ type: "resume", payload: resume });
    this.#unfinished = [];
    this.#openedAt = performance.now();
    this.#hear();
    for (const { text, call } of this.#outbox.splice(0)) {
      this.#socket?.send(text);
      if (call) call.sent = true;
    }
    this.#become("open");
  }

  /** Note that the server lives. */
  #hear() {
    this.#isProbing = false;
    this.#after(SILENCE, () => this.#probe());
  }

  #probe() {
    this.#isProbing = true;
    this.#write({ type: "$ping" });
    this.#after(PROBE, () => this.#drop(1006, "no answer to a ping"));
  }

  /** Take leave of the socket, and come back later if that makes sense. @param {number} code */
  #drop(code, reason = "") {
    if (performance.now() - this.#openedAt >= STEADY) {
      this.#failures = 0;
      this.#isRenewed = false;
    }
    // Codes from 3000 and from 4000 on mirror HTTP: 3403 and 4403 are its 403.
    const status = code < 3000 ? 0 : code % 1000;
    if (isFinal(code, status) && !this.#mayRenew(status)) return this.#finish(code, reason);
    const shortest = isBusy(code, status) ? BUSY : SHORTEST;
    const longest = Math.min(LONGEST, shortest * 2 ** ++this.#failures);
    // Random, so that not all clients come back at once. A user who returns does not wait.
    const wait = this.#isWanted ? 0 : shortest + Math.random() * (longest - shortest);
    this.#detach();
    this.#after(wait, () => this.#open());
    this.#lose((call) => call.sent && !this.#isResumable(call), "the connection was lost");
    this.#become("waiting", { code, reason, wait });
  }

  /** Whether this is the first refusal of a token that can be had anew. @param {number} status */
  #mayRenew(status) {
    const may = status === 401 && !this.#isRenewed && typeof this.#options.token === "function";
    return may && (this.#isRenewed = true);
  }

  /** @param {number} code @param {string} reason */
  #finish(code, reason) {
    this.#detach();
    this.#over.abort();
    this.#state = "closed"; // Nobody sends more from here on.
    this.#lose(() => true, "the client is closed");
    this.#outbox = [];
    this.#save();
    this.#become("closed", { code, reason });
  }

  /** Abandon the socket in any state: a dead one would take a minute to report its end. */
  #detach() {
    const socket = this.#socket;
    if (socket) socket.onopen = socket.onmessage = socket.onclose = socket.onerror = null;
    socket?.close();
    this.#socket = null;
    this.#attempt++;
    this.#openedAt = Infinity;
    this.#isProbing = this.#isWanted = false;
    clearTimeout(this.#timer);
  }

  /** @param {number} ms @param {() => void} f */
  #after(ms, f) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(f, ms);
  }

  /** @param {State} state @param {Detail} [detail] */
  #become(state, detail) {
    this.#state = state;
    this.#emit("$state", state, detail);
  }

  // ── messages ─────────────────────────────────────────────────────────────────────────────────

  /** @param {Message} message */
  #write(message) {
    this.#socket?.send(JSON.stringify(message));
  }

  /**
   * Send a message now, or once the connection is open.
   *
   * @param {Message} message @param {Sending} [call] what is told that it has been sent
   */
  #post(message, call) {
    const text = JSON.stringify(message), socket = this.#socket;
    const isOpen = this.#state === "open" && socket?.readyState === 1; // else it would vanish
    const size = isOpen ? 0 : new Blob([text]).size;
    const buffered = socket?.bufferedAmount ?? 0;
    const total = this.#outbox.reduce((sum, each) => sum + each.size, buffered + size);
    const isFull = this.#outbox.length >= MOST_WAITING || total > MOST_BYTES;
    if (isFull || this.#state === "closed") {
      throw new Lost(false, isFull ? "the outbox is full" : "the client is closed");
    }
    if (!isOpen) this.#outbox.push({ text, size, call });
    else socket.send(text);
    if (call) call.sent = isOpen;
  }

  /** Note that an answer is to come. @param {string} type @returns {Call} */
  #call(type, id = ++this.#lastId) {
    const call = { id, type, sent: false, at: null, taken: null, done() {}, fail() {} };
    this.#calls.set(id, call);
    return call;
  }

  /** Forget a call, and what has not been sent of it. @param {Call} call */
  #withdraw(call) {
    this.#calls.delete(call.id);
    this.#outbox = this.#outbox.filter((each) => each.call !== call);
  }

  /** @param {Call} call */
  #items(call) {
    const took = () => isHidden() && this.#save();
    return new Items(call, took, () => {
      if (!call.sent) return this.#withdraw(call);
      call.item = call.done = call.fail = () => {}; // It waits for its final answer unheard.
      call.stop = { sent: this.#state === "open" };
      if (call.stop.sent) return this.#write({ type: "complete", id: call.id });
      try {
        this.#post({ type: "complete", id: call.id }, call.stop);
      } catch {
        this.#withdraw(call); // The outbox is full: the stream ends because nobody resumes it.
      }
    });
  }

  /** Whether the server may still have what is to come. @param {Call} call */
  #isResumable(call) {
    // A stream without a position has sent nothing yet, and the server knows what becomes of it.
    const isStream = !call.isPlain && call.at !== undefined && !call.stop?.sent;
    return isStream && call.sent && this.#options.resume !== false;
  }

  /** @param {(call: Call) => boolean} which @param {string} why */
  #lose(which, why) {
    for (const [id, call] of this.#calls) {
      if (!which(call)) continue;
      this.#calls.delete(id);
      call.fail(new Lost(call.sent, why));
    }
  }

  /** @param {Message} message */
  #receive(message) {
    if (this.#state === "open") this.#hear();
    // What comes before the answer may have waited, in a page that was frozen, for the end as well.
    if (message.type === "$pong") this.#isWanted = false;
    const { type, id, payload, at } = message, call = this.#calls.get(id);
    if (id == null) {
      this.#emit(type, payload, message);
      this.#advance(message); // only now: a page that dies before gets the message again
    } else if (String(id).startsWith("$")) {
      this.#reply(message);
    } else if (call && message.more) {
      call.at = at;
      call.item?.(payload, at);
    } else if (call) {
      this.#calls.delete(id);
      if (type === "error") call.fail(errorOf(payload));
      else call.done(payload);
      if (!call.isPlain && isHidden()) this.#save();
    }
  }

  /** @param {string} type @param {...any} args */
  #emit(type, ...args) {
    const all = this.#listeners.get(type) ?? new Set();
    for (const f of [...all]) {
      // One before it may have taken it away; or changed the state, which all know by now.
      if (!all.has(f) || (type === "$state" && args[0] !== this.#state)) continue;
      try {
        f(...args);
      } catch (error) {
        report(error); // The other listeners are called all the same.
      }
    }
  }

  /** Answer a question of the server. @param {Message} question */
  async #reply(question) {
    const socket = this.#socket, { id } = question;
    const text = await this.#answerTo(question).catch((error) => {
      report(error);
      return failure(id, new MessageError("internal_error"));
    });
    if (socket === this.#socket) socket?.send(text); // Another connection does not know the id.
  }

  /** @param {Message} question */
  async #answerTo({ type, id, payload }) {
    const f = this.#answerers.get(type);
    try {
      if (!f) throw new MessageError("unknown_type", `nothing answers ${type}`);
      return JSON.stringify({ type: `${type}.reply`, id, payload: await f(payload) });
    } catch (error) {
      if (error instanceof MessageError) return failure(id, error);
      throw error;
    }
  }

  // ── positions ────────────────────────────────────────────────────────────────────────────────

  /** Note how far the client has come. @param {Message} message */
  #advance({ type, payload, group, at }) {
    if (group === undefined || this.#options.resume === false) return;
    const isVerdict = type === "resume" || type === "gap", groups = this.#groups;
    if (at || type === "gap") groups.delete(group); // What came before a gap counts for nothing.
    if (at) groups.set(group, at);
    if (groups.size > MOST_GROUPS) groups.delete(groups.keys().next().value ?? "");
    const id = isVerdict && payload?.id;
    if (id && !this.#ids.includes(id)) this.#ids = [...this.#ids, id].slice(-MOST_IDS);
    if (at || isVerdict) this.#save();
  }

  /** Return what the server has to know to let this client go on, or undefined. */
  #resume() {
    if (this.#options.resume === false) return undefined;
    const streams = this.#streams();
    return {
      groups: this.#groups.size ? Object.fromEntries(this.#groups) : undefined,
      ids: this.#ids.length ? this.#ids : undefined,
      streams: streams.length ? streams.map(({ id, at }) => ({ id, at })) : undefined,
    };
  }

  /** The streams that go on over the end of a connection. */
  #streams() {
    return [...this.#calls.values()].filter((call) => this.#isResumable(call));
  }

  /**
   * Put all that into the address, and return true; or promise a message there.
   *
   * @param {boolean} byMessage
   */
  #announce(byMessage) {
    const resume = this.#resume(), text = JSON.stringify(resume);
    if (!resume) return true;
    // An address may be logged, and the position of a stream is what gives the right to it.
    const isLong = resume.streams || encodeURIComponent(text).length > MOST_URL;
    const isTold = !(byMessage || isLong || this.#unfinished.length);
    this.#address.searchParams.set("resume", isTold ? text : "message");
    return isTold;
  }

  #load() {
    const { storage, resume } = this.#options;
    if (resume === false) return;
    try {
      const { groups, ids, streams } = JSON.parse(storage?.getItem(this.#key) ?? "{}");
      this.#groups = new Map(Object.entries(groups ?? {}));
      this.#ids = [...(ids ?? [])];
      const going = [...(streams ?? [])];
      this.#unfinished = going.filter((each) => Number.isSafeInteger(each?.id));
    } catch {
      // Access is denied, or another program has written there: begin anew.
    }
    this.#lastId = Math.max(0, ...this.#unfinished.map(({ id }) => id));
    // A page that was rendered from positions knows better than the one before it.
    for (const [group, at] of Object.entries(resume ?? {})) this.#groups.set(group, at);
    this.#save();
  }

  /**
   * Write down the positions; and, while the page is hidden, what belongs to this tab alone. A tab
   * that is duplicated has a copy of the storage: with our ids it would miss what we say, and it
   * would take our streams.
   */
  #save() {
    const { storage, resume } = this.#options;
    if (!storage || resume === false) return;
    const going = this.#streams().filter((call) => !call.stop);
    const streams = going.map(({ id, type, taken }) => ({ id, type, at: taken }));
    const groups = Object.fromEntries(this.#groups);
    const note = isHidden() ? { groups, ids: this.#ids, streams } : { groups };
    try {
      storage.setItem(this.#key, JSON.stringify(note));
    } catch {
      // It is full, or access is denied: a reload goes on from what it has, or begins anew.
    }
  }
}

/** Whether this is a page that may be killed without a word. In Node there is nothing to see. */
function isHidden() {
  return globalThis.document?.hidden !== false;
}

/** Whether another attempt would end like the last. @param {number} code @param {number} status */
function isFinal(code, status) {
  if ([1000, 1003, 1007, 1008, 1009].includes(code)) return true;
  return status >= 400 && status < 500 && !isBusy(code, status);
}

/** Whether the server asks for patience. @param {number} code @param {number} status */
function isBusy(code, status) {
  return [1012, 1013].includes(code) || [408, 429].includes(status) || /^5..$/.test(`${status}`);
}

/** Return the answer to a question that failed. @param {any} id @param {MessageError} error */
function failure(id, { code, message, details }) {
  return JSON.stringify({ type: "error", id, payload: { ...details, code, message } });
}

/** @param {any} payload of an `error` */
function errorOf(payload) {
  const { code, message, ...details } = payload ?? {};
  return new MessageError(code, message, details);
}

/** Show the bug of a listener where the page's own bugs are shown. @param {unknown} error */
function report(error) {
  (globalThis.reportError ?? console.error)(error);
}
