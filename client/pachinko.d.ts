/** Types of Pachinko's client; docs/client.md explains it. Times are in milliseconds. */

/** `waiting`: for the next attempt. `closed`: for good, by `close()` or by a final close code. */
export type State = "connecting" | "open" | "waiting" | "closed";

/** Why the connection has ended, and how long the client waits before it comes back. */
export interface Detail {
  code: number;
  reason: string;
  wait?: number;
}

/** An envelope, as the server has sent it. */
export interface Message<P = any> {
  type: string;
  payload?: P;
  group?: string;
  /** The position in a kept group: store and return it, never compare it. */
  at?: string;
}

type Token = string | null | undefined;

export interface Options {
  /** Goes into the first message. A function is asked before each attempt. */
  token?: Token | (() => Token | Promise<Token>);
  /** `sessionStorage`, say: keeps positions over a reload. */
  storage?: Pick<Storage, "getItem" | "setItem">;
  /** Whether kept groups and streams go on after a cut, or the positions to begin at, by group. */
  resume?: boolean | Record<string, string>;
  /** Subprotocols. With `"bearer"` among them the token goes there, not into a message. */
  protocols?: string | readonly string[];
}

/** The messages of an application, by type. Without it, every type and payload is allowed. */
export interface Messages {
  /** What `send` takes. */
  sends: Record<string, any>;
  /** What `request` takes and returns. */
  requests: Record<string, { payload: any; reply: any }>;
  /** What `stream` takes, and its items. */
  streams: Record<string, { payload: any; item: any }>;
  /** What `on` gets. */
  events: Record<string, any>;
  /** What the server asks, and the answers. */
  questions: Record<string, { payload: any; reply: any }>;
}

/** The error that the server has answered with. */
export class MessageError extends Error {
  constructor(code: string, message?: string, details?: Record<string, any>);
  /** What programs go by: it is stable, and the message is for developers. */
  code: string;
  /** What else the error said: `errors`, `retry_after`, … */
  details: Record<string, any>;
}

/** There is no answer, and there will be none. `name` is `TimeoutError` after a time-out. */
export class Lost extends Error {
  constructor(sent: boolean, why: string, name?: string);
  /** Whether the server may have done what it was asked for. */
  sent: boolean;
}

/** The items of a stream. Leaving the loop, or `return()`, stops the stream on the server. */
export interface Items<T> extends AsyncIterableIterator<T> {
  return(): Promise<IteratorResult<T>>;
}

type Key<T> = keyof T & string;
type Rest<P> = undefined extends P ? [payload?: P] : [payload: P];

export interface Client<M extends Messages = Messages> {
  readonly state: State;
  /** Send what needs no answer. Throws `Lost` if the client is closed, or its outbox full. */
  send<T extends Key<M["sends"]>>(type: T, ...payload: Rest<M["sends"][T]>): void;
  /** Send a message, and return its answer's payload. Rejects with `MessageError` or `Lost`. */
  request<T extends Key<M["requests"]>>(
    type: T,
    payload?: M["requests"][T]["payload"],
    options?: { timeout?: number; signal?: AbortSignal },
  ): Promise<M["requests"][T]["reply"]>;
  /** Start a stream, and return its items; the signal stops it. Throws `Lost` as `send` does. */
  stream<T extends Key<M["streams"]>>(
    type: T,
    payload?: M["streams"][T]["payload"],
    options?: { signal?: AbortSignal },
  ): Items<M["streams"][T]["item"]>;
  /** Return the stream that the page before a reload has not finished. Call it after `connect`. */
  resumed<T extends Key<M["streams"]>>(type: T): Items<M["streams"][T]["item"]> | undefined;
  /** Call `f` with each change of the state. What is returned ends that. */
  on(type: "$state", f: (state: State, detail?: Detail) => void): () => void;
  /** Call `f` where messages were missed, or where it is sure that none were. */
  on(type: "gap", f: (payload: Gap, message: Message<Gap>) => void): () => void;
  on(type: "resume", f: (payload: Resumed, message: Message<Resumed>) => void): () => void;
  /** Call `f` with an error that answers a message without an id. */
  on(type: "error", f: (payload: Failure, message: Message<Failure>) => void): () => void;
  /** Call `f` with each message of a type. What is returned ends that. */
  on<T extends Key<M["events"]>>(
    type: T,
    f: (payload: M["events"][T], message: Message<M["events"][T]>) => void,
  ): () => void;
  /** Answer each question of a type with what `f` returns, or with a `MessageError` it throws. */
  answer<T extends Key<M["questions"]>>(
    type: T,
    f: (
      payload: M["questions"][T]["payload"],
    ) => M["questions"][T]["reply"] | Promise<M["questions"][T]["reply"]>,
  ): void;
  /** Try now instead of later; see whether an open connection still lives. */
  retry(): void;
  /** Close for good. What waits for an answer rejects with `Lost`. */
  close(code?: number, reason?: string): void;
}

export interface Gap {
  /** Messages to this group are missing; or, if it is null, such to a user or to everybody. */
  group: string | null;
  /** Absent if the group is not kept. */
  reason?: "expired" | "epoch" | "limit" | "broker" | "overflow" | "snapshot" | (string & {});
  id?: string;
}

export interface Resumed {
  replayed: number;
  id: string;
}

export interface Failure {
  code: string;
  message: string;
  [detail: string]: any;
}

/**
 * Connect, and stay connected. Returns at once; what is sent meanwhile waits in the outbox. Throws
 * `TypeError` if this is not the address of a WebSocket.
 */
export function connect<M extends Messages = Messages>(
  url: string | URL,
  options?: Options,
): Client<M>;
