// A question that has to be answered first. The browser's own <dialog>: it keeps the focus, and Esc is a no.

import { h, newId } from './dom'
import type { Key } from './words'

export interface Question {
  title: Key
  body: Node[]
  confirm: Key
  /** For tests. */
  id: string
  /** Awaited on a yes; what it throws keeps the dialog open. */
  act: (say: (words: string) => void) => Promise<void>
}

/** Whether it was done. */
export function askFirst(question: Question): { done: Promise<boolean>; enable: (on: boolean) => void } {
  const titleId = newId('dialog')
  const problem = h('p', { class: 'problem', role: 'alert', hidden: true, 'data-testid': `${question.id}-problem` })
  const say = (words: string): void => {
    problem.textContent = words
    problem.hidden = words === ''
  }
  const yes = h('button', { type: 'submit', class: 'primary', t: question.confirm, 'data-testid': `${question.id}-yes` })
  const no = h('button', { type: 'button', t: 'dialog.no', 'data-testid': `${question.id}-no` })
  const title = h('h2', { id: titleId, tabindex: '-1', t: question.title })
  const form = h(
    'form',
    { method: 'dialog' },
    title,
    ...question.body,
    problem,
    h('div', { class: 'actions' }, no, yes),
  )
  const dialog = h('dialog', { 'aria-labelledby': titleId, 'data-testid': question.id }, form)
  const before = document.activeElement
  document.body.append(dialog)
  let isDone = false
  const done = new Promise<boolean>((resolve) => {
    dialog.addEventListener('close', () => {
      dialog.remove()
      if (before instanceof HTMLElement && before.isConnected) before.focus()
      resolve(isDone)
    })
  })
  no.addEventListener('click', () => dialog.close())
  form.addEventListener('submit', (event) => {
    event.preventDefault()
    if (yes.disabled) return
    say('')
    yes.disabled = true
    yes.setAttribute('aria-busy', 'true')
    question
      .act(say)
      .then(() => {
        isDone = true
        dialog.close()
      })
      .catch((error: unknown) => {
        if (problem.hidden) say(error instanceof Error ? error.message : String(error))
      })
      .finally(() => {
        yes.disabled = false
        yes.removeAttribute('aria-busy')
      })
  })
  dialog.showModal()
  yes.focus()
  const enable = (on: boolean): void => {
    yes.disabled = !on
    if (!on) title.focus()
    else if (document.activeElement === title) yes.focus()
  }
  return { done, enable }
}
